"""Two versions of lightning_dist, this one and that of another checkout: they train alike, and what a step takes."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path

from rich.progress import Progress

from recipes.benchmark.agreement import CHECK_STEPS, agreements
from recipes.benchmark.device import add_device_argument, device_type
from recipes.benchmark.interleaving import alternate
from recipes.benchmark.results import Line, Record, timed
from recipes.benchmark.turns import progress_bar
from recipes.benchmark.version_process import VersionProcesses
from recipes.benchmark.version_rank import MODELS, Task

HERE = Path(__file__).resolve().parents[2]
STEP_MUST = 1.02
QUICK = {"models": ["llama_tiny"], "rounds": 15}
CLOCKS = {
    "wall": "step (wall clock, minimum / median)",
    "user": "step (user CPU time of all ranks, minimum / median)",
}
"""Of which others on the machine disturb the second less."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--against",
        type=Path,
        required=True,
        metavar="PATH",
        help="folder that holds the other lightning_dist: a checkout, or what pip install --target filled",
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes of each version (default: 2)")
    parser.add_argument(
        "--layouts",
        nargs="+",
        metavar="LAYOUT",
        help="(default: each of dp_replicate, dp_shard, tp, pp over all ranks)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=["decoder_tiny", "llama"],
        metavar="MODEL",
        help=f"of {', '.join(MODELS)} (default: decoder_tiny llama)",
    )
    parser.add_argument("--rounds", type=int, default=30, help="bursts of each version (default: 30)")
    parser.add_argument("--steps", type=int, default=6, help="steps of a burst (default: 6)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the first burst (default: 5)")
    parser.add_argument(
        "--control", action="store_true", help="measure this version twice: what the machine's noise is"
    )
    parser.add_argument("--no-check", dest="check", action="store_false", help="do not compare training in float64")
    add_device_argument(parser)


def measure(options: argparse.Namespace, record: Record) -> None:
    """Wall clock and user CPU time of a step, by layout and model; every version has processes of its own.

    Raises:
        ValueError: there is no other version.
        RuntimeError: after all was measured: ranks ended under some layouts; what they printed is in the message.
    """
    other = options.against.resolve()
    if not (other / "lightning_dist" / "__init__.py").is_file():
        raise ValueError(f"--against {options.against}: no lightning_dist in it; pass the folder of a checkout")
    layouts = options.layouts or [f"{axis}={options.ranks}" for axis in ("dp_replicate", "dp_shard", "tp", "pp")]
    versions = {"this": HERE, "other": other} | ({"this again": HERE} if options.control else {})
    record.about["revisions"] = {name: _revision(package) for name, package in versions.items()}
    left, failures = list(product(options.models, layouts)), list[str]()
    with progress_bar(True) as progress:
        while left:
            with _started(versions, options) as started:
                try:
                    while left:
                        record.extend(_measure(*left.pop(0), started, options, progress))
                except RuntimeError as error:  # the next one gets new processes
                    failures.append(str(error))
    if failures:
        raise RuntimeError("\n\n".join(failures))


@contextmanager
def _started(versions: dict[str, Path], options: argparse.Namespace) -> Iterator[dict[str, VersionProcesses]]:
    device = device_type(options.device, options.ranks)
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(VersionProcesses(name, package, options.ranks, device))
            for name, package in versions.items()
        }


def _revision(package: Path) -> str | None:
    """Of a git checkout, with what is not committed told."""
    command = ["git", "-C", str(package), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _measure(
    model: str,
    layout: str,
    started: dict[str, VersionProcesses],
    options: argparse.Namespace,
    progress: Progress,
) -> Iterator[Line]:
    task = Task(layout, model, options.warmup + options.rounds * options.steps, CHECK_STEPS)
    shown = progress.add_task(f"{layout} {model}", total=len(started) * (options.rounds + 1 + options.check))

    def advance() -> None:
        progress.advance(shown)

    for processes in started.values():
        processes.ask_for(task)
    if options.check:
        yield from _check(f"{layout}, {model}", started, advance)
    for processes in started.values():
        processes.begin()
    for processes in started.values():
        processes.take(options.warmup)
        advance()
    bursts = alternate(started, options.rounds, options.steps, advance)
    for processes in started.values():
        processes.end()
    for clock, group in CLOCKS.items():
        seconds = {name: [burst[clock] for burst in found] for name, found in bursts.items()}
        for name in list(started)[1:]:
            yield timed(group, f"{layout}, {model}: this against {name}", seconds["this"], seconds[name], STEP_MUST)


def _check(what: str, started: dict[str, VersionProcesses], on_version: Callable[[], None]) -> Iterator[Line]:
    """Of the rank on which the versions differ most."""
    for processes in started.values():
        processes.ask_for_check()
    trained = []
    for processes in started.values():
        trained.append(processes.checked())
        on_version()
    ranks = [dict(zip(started, of_rank, strict=True)) for of_rank in zip(*trained, strict=True)]
    for lines in zip(*(agreements(of_rank, what) for of_rank in ranks), strict=True):
        yield max(lines, key=lambda line: line.ratios["exact"])
