"""What the benchmarks share: options of the timing, a progress bar, and turns whose slowest rank counts."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recipes.benchmark.agreement import train_alike
from recipes.benchmark.interleaving import Competitor, interleave
from recipes.benchmark.results import Line

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def add_timing_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of what is timed."""
    parser.add_argument("--rounds", type=int, default=30, help="bursts of each competitor (default: 30)")
    parser.add_argument("--steps", type=int, default=6, help="steps of a burst (default: 6)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the first burst (default: 5)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="of steps: wall, or cpu, the time that a rank computes, for a machine that others use (default: wall)",
    )


def progress_bar(shown: bool) -> Progress:
    """On the error stream, so that the tables can be piped."""
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
        redirect_stdout=sys.stdout.isatty(),
    )


def alike(what: str, competitors: dict[str, Competitor], progress: Progress) -> Iterator[Line]:
    """Whether they train the same, see :func:`~recipes.benchmark.agreement.train_alike`."""
    task = progress.add_task(f"{what}, float64", total=len(competitors))
    yield from train_alike(competitors, what, lambda: progress.advance(task))


def take_turns(
    what: str, competitors: dict[str, Competitor], options: argparse.Namespace, progress: Progress
) -> dict[str, list[list[float]]]:
    """Seconds of the slowest rank. Communication: also one gather of all times over the world."""
    task = progress.add_task(what, total=options.rounds * len(competitors))
    own = interleave(
        competitors,
        options.rounds,
        options.steps,
        options.warmup,
        lambda: progress.advance(task),
        CLOCKS[options.clock],
    )
    gc.collect()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {
        name: [[max(steps) for steps in zip(*bursts, strict=True)] for bursts in zip(*of_ranks, strict=True)]
        for name, of_ranks in ((name, [one[name] for one in everyone]) for name in own)
    }
