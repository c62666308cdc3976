"""``lightning-dist doctor``: options, what is shown while it runs, exit status."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lightning_dist.doctor.examine import examine
from lightning_dist.doctor.report import Report
from lightning_dist.doctor.settings import Settings, choose_ranks
from lightning_dist.elastic import is_launched


def add_doctor(commands: Any) -> None:
    """Adds the subcommand to what ``add_subparsers`` gave."""
    doctor = commands.add_parser(
        "doctor",
        help="check on this machine that every layout trains as one process does",
        description="Checks versions, devices, collectives, parity of every layout with one process, checkpoints, and "
        "what happens when a rank is killed. Starts its ranks itself; exit status 1 if a check failed.",
    )
    doctor.add_argument("--devices", type=int, metavar="N", help="ranks (default: the accelerators, or on a CPU 4)")
    doctor.add_argument("--accelerator", choices=["auto", "cpu"], default="auto", help="cpu: leave accelerators alone")
    doctor.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="kinds of checks (versions, devices, links, alone, collectives, timeouts, parity, checkpoint, kill), or "
        'whole names, such as "parity tp=2"',
    )
    doctor.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="what to leave out, named as for --only")
    doctor.add_argument("--timeout", type=float, default=120.0, metavar="S", help="for ranks to answer (default: 120)")
    doctor.add_argument("--directory", type=Path, help="where checkpoints are tried (default: for temporary files)")
    doctor.add_argument(
        "--output", type=Path, default=Path("doctor.json"), help="the file to attach to a report (default: doctor.json)"
    )
    doctor.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Exit status: 0 if nothing failed, else 1.

    Raises:
        ValueError: options that can't be.
    """
    if is_launched():
        raise ValueError("doctor starts its ranks itself; run it as one process, without torchrun")
    if options.timeout <= 0:
        raise ValueError(f"--timeout is {options.timeout:g}; the ranks need some seconds to answer")
    num_ranks, device_type = choose_ranks(options.devices, options.accelerator)
    directory = options.directory or Path(tempfile.gettempdir())
    if not directory.is_dir():
        raise ValueError(f"--directory {directory} is not there; make it first")
    settings = Settings(num_ranks, device_type, options.timeout, directory)
    shown = _Shown(options.output)
    with shown.running:
        report = examine(settings, options.only, options.skip, shown.begin)
        shown.end(report)
    if (rates := report.rates()) is not None:
        shown.console.print(rates)
    shown.console.print(f"wrote {options.output}: attach it to a report; it names no paths, users or machines")
    return 0 if report.is_ok else 1


class _Shown:
    """The table and a progress bar while checks run, or line after line without a terminal; the file is written after
    each check, so that it has all results so far.
    """

    def __init__(self, output: Path) -> None:
        self.console = Console()
        self._output = output
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task = self._progress.add_task("", total=None)
        self._live = Live(self._progress, console=self.console, refresh_per_second=4)
        self.running: AbstractContextManager[Any] = self._live if self.console.is_terminal else nullcontext()

    def begin(self, report: Report, name: str) -> None:
        self._show(report)
        done, count = len(report.results), report.num_checks
        self._progress.update(self._task, description=name, total=count, completed=done)
        if self.console.is_terminal:
            self._live.update(Group(report.table(), self._progress))

    def end(self, report: Report) -> None:
        self._show(report)
        if self.console.is_terminal:
            self._live.update(report.table(), refresh=True)

    def _show(self, report: Report) -> None:
        report.write(self._output)  # before the first check too: what can't be written is told at once
        if report.results and not self.console.is_terminal:
            result = report.results[-1]
            self.console.print(f"{result.name}: {result.status}: {result.reason}", markup=False, soft_wrap=True)
