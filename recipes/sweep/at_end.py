"""What a sweep leaves in its directory, ``sweep.csv`` and ``report.html``, and at its end in the terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console

from recipes.sweep.jobs import Jobs
from recipes.sweep.live import Live
from recipes.sweep.submitted import is_by_submitit, survive_killed_jobs
from recipes.sweep.table import print_table, write_csv

log = logging.getLogger("recipes.train")

CSV, REPORT = "sweep.csv", "report.html"


class SweepTable(Callback):
    """Writes ``sweep.csv`` and ``report.html`` to the directory of a sweep whenever a job has begun or ended, and when
    the sweep is interrupted. At its end prints a table of all jobs, and exits with status 1 if any of them failed.

    It reads the directories of the jobs, so it doesn't matter which Hydra launcher ran them.
    """

    def __init__(self) -> None:
        self._live: Live | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Some launchers send this to where a job runs, which writes no page."""
        return {"_live": None}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Begins to write."""
        directory = Path(config.hydra.sweep.dir).absolute()
        self._live = Live(directory, lambda: _write(Jobs.read([directory]), directory))
        self._live.start()
        if is_by_submitit(config):
            survive_killed_jobs(directory)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints and writes.

        Raises:
            SystemExit: a job failed, or did not come to its end, or the jobs can't be read.
        """
        if self._live is not None:
            self._live.stop()
        directory, console = Path(config.hydra.sweep.dir), Console()
        try:  # Hydra makes a warning of what a callback raises, and status 0
            jobs = Jobs.read([directory])
            wrong = {state: len(jobs.of_state(state)) for state in ("failed", "interrupted")}
        except Exception as error:
            console.print(f"the jobs in {directory} can't be read: {error}", markup=False, soft_wrap=True)
            raise SystemExit(1) from None
        _show(jobs, directory, console)
        if any(wrong.values()):
            told = " and ".join(f"{count} of {len(jobs.all)} jobs {state}" for state, count in wrong.items() if count)
            console.print(f"{told}; their logs are in {directory}", highlight=False, soft_wrap=True)
            raise SystemExit(1)


def _show(jobs: Jobs, directory: Path, console: Console) -> None:
    """The table and both files, as far as they can be written."""
    with _warned("table"):
        print_table(jobs, console)
    with _warned(CSV):
        write_csv(jobs, directory / CSV)
    with _warned(REPORT):
        _write_page(jobs, directory)
        console.print(f"{directory / REPORT} shows them", highlight=False, soft_wrap=True)


@contextmanager
def _warned(what: str) -> Iterator[None]:
    """What can't be written is a warning: how the jobs ended is told all the same."""
    try:
        yield
    except Exception as error:
        log.warning("no %s of the sweep: %s", what, error)


def _write(jobs: Jobs, directory: Path) -> None:
    """Both files; an ImportError, after the first of them, where what the page needs is missing."""
    write_csv(jobs, directory / CSV)
    _write_page(jobs, directory)


def _write_page(jobs: Jobs, directory: Path) -> None:
    from recipes.sweep.report import write_report  # slow to import

    write_report(jobs, directory / REPORT)
