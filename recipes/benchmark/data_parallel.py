"""The data axes: step time, bytes per rank, collectives per step, time to the first step."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch.distributed as dist
from rich.progress import Progress

from lightning_dist.elastic import launch
from recipes.benchmark.competitors import (
    HandWritten,
    free_of_noise,
    lightning_ddp,
    lightning_model_parallel,
    ours,
)
from recipes.benchmark.data_parallel_collectives import BYTES_MUST, CountedRuns, collectives
from recipes.benchmark.device import add_device_argument, device_type, join_process_group, rank_device
from recipes.benchmark.interleaving import Competitor, no_pace
from recipes.benchmark.memory import HeldBytes, most, peak_memory
from recipes.benchmark.results import Line, Record, counted, timed
from recipes.benchmark.start import commands, seconds_to_first_step
from recipes.benchmark.turns import add_timing_arguments, alike, progress_bar, take_turns
from recipes.benchmark.workloads import WORKLOADS, Workload

STEP_MUST, START_MUST = 1.0, 1.1
QUICK = {"models": ["decoder_tiny"], "rounds": 10, "start_rounds": 1}
PARTS = ("replicate", "shard", "bytes", "collectives", "start")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--ranks", type=int, default=2, help="processes; 4 add the hybrid layout (default: 2)")
    add_device_argument(parser)
    add_timing_arguments(parser)
    parser.add_argument("--start-rounds", type=int, default=5, help="whole processes of each kind (default: 5)")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=WORKLOADS,
        default=list(WORKLOADS),
        metavar="MODEL",
        help=f"of {', '.join(WORKLOADS)} (default: all)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help=f"of {', '.join(PARTS)} (default: all)",
    )


def measure(options: argparse.Namespace, record: Record) -> None:
    """Every line that the options ask for."""
    if set(options.parts) - {"start"}:
        launch(_measure_on_rank, options, record, num_processes=options.ranks)
    if "start" in options.parts:
        with progress_bar(True) as progress:
            record.extend(_start(options, progress))


def _measure_on_rank(options: argparse.Namespace, record: Record) -> None:
    free_of_noise()
    join_process_group(device_type(options.device, options.ranks))
    with progress_bar(dist.get_rank() == 0) as progress:
        for name in options.models:
            workload = WORKLOADS[name]
            if "replicate" in options.parts:
                record.extend(_replicate(name, workload, options, progress))
            if "shard" in options.parts:
                record.extend(_shard(name, workload, options, progress))
        workload, name = WORKLOADS[options.models[-1]], options.models[-1]
        if "bytes" in options.parts:
            record.extend(_bytes(name, workload, options.ranks))
            record.extend(_peaks(name, workload, options.ranks))
        if "collectives" in options.parts:
            record.extend(_collectives(name, workload, options.ranks))


def _replicate(name: str, workload: Workload, options: argparse.Namespace, progress: Progress) -> Iterator[Line]:
    competitors: dict[str, Competitor] = {
        "ours": ours(workload, f"dp_replicate={options.ranks}"),
        "ddp": lightning_ddp(workload),
        "ddp again": lightning_ddp(workload),
    }
    group = f"step, dp_replicate={options.ranks} ({options.clock} clock, minimum / median)"
    different = {kind: competitors[kind] for kind in ("ours", "ddp")}
    yield from alike(f"dp_replicate={options.ranks}, {name}", different, progress)
    seconds = take_turns(f"replicate {name}", competitors, options, progress)
    yield timed(group, f"{name}: against Lightning's ddp", seconds["ours"], seconds["ddp"], STEP_MUST)
    yield timed(group, f"{name}: ddp against itself", seconds["ddp again"], seconds["ddp"])


def _shard(name: str, workload: Workload, options: argparse.Namespace, progress: Progress) -> Iterator[Line]:
    competitors: dict[str, Competitor] = {
        "ours": ours(workload, f"dp_shard={options.ranks}"),
        "by hand": HandWritten(workload),
        "by hand, foreach": HandWritten(workload, foreach=True),
        "model parallel": lightning_model_parallel(workload),
    }
    group = f"step, dp_shard={options.ranks} ({options.clock} clock, minimum / median)"
    yield from alike(f"dp_shard={options.ranks}, {name}", competitors, progress)
    seconds = take_turns(f"shard {name}", competitors, options, progress)
    mine, by_hand, foreach = seconds["ours"], seconds["by hand"], seconds["by hand, foreach"]
    yield timed(group, f"{name}: against fully_shard by hand, no Lightning", mine, by_hand, STEP_MUST)
    yield timed(group, f"{name}: against that with AdamW(foreach=True), as ours chooses", mine, foreach)
    yield timed(group, f"{name}: against ModelParallelStrategy", mine, seconds["model parallel"])
    yield timed(group, f"{name}: ModelParallelStrategy against by hand", seconds["model parallel"], by_hand)


def _layouts(ranks: int) -> dict[str, tuple[str, int]]:
    """Layouts of so many ranks: name of the kind, and the layout with its number of shards."""
    layouts = {"replicate": (f"dp_replicate={ranks}", 1), "shard": (f"dp_shard={ranks}", ranks)}
    if ranks >= 4 and ranks % 2 == 0:
        layouts["hybrid"] = (f"dp_replicate=2,dp_shard={ranks // 2}", ranks // 2)
    return layouts


def _bytes(name: str, workload: Workload, ranks: int) -> Iterator[Line]:
    """The rank that holds most is shown."""
    group = "bytes per rank, against whole / shards"
    for layout, shards in _layouts(ranks).values():
        held = HeldBytes()
        ours(workload, layout, callbacks=(held,))(no_pace, 3)
        for what, whole in held.whole.items():
            yield counted(group, f"{name}, {layout}: {what}", most(held.held[what]), whole / shards, BYTES_MUST)


def _peaks(name: str, workload: Workload, ranks: int) -> Iterator[Line]:
    """Of an accelerator; the CPU does not tell."""
    if rank_device().type == "cpu":
        return
    peers: dict[str, Competitor] = {"replicate": lightning_ddp(workload), "shard": HandWritten(workload)}
    for kind, peer in peers.items():
        layout, _ = _layouts(ranks)[kind]
        mine, its = (most(peak_memory(partial(run, no_pace, 3))) for run in (ours(workload, layout), peer))
        yield counted("peak memory of a rank", f"{name}, {layout}: against {kind} by its peer", mine, its, None, " B")


def _collectives(name: str, workload: Workload, ranks: int) -> Iterator[Line]:
    for layout, shards in _layouts(ranks).values():
        yield from collectives(name, CountedRuns(workload, layout, ranks // shards, shards))


def _start(options: argparse.Namespace, progress: Progress) -> list[Line]:
    """Whole processes, one after the other, in rounds."""
    ways = commands(options.ranks)
    seconds: dict[str, list[list[float]]] = {name: [] for name in ways}
    task = progress.add_task("start to first step", total=options.start_rounds * len(ways))
    for number in range(options.start_rounds):
        for name in list(ways) if number % 2 == 0 else reversed(ways):
            seconds[name].append([seconds_to_first_step(ways[name])])
            progress.advance(task)
    group = "start to first step (minimum / median)"
    return [
        timed(group, "a user's script, strategy=hybrid against ddp", seconds["hybrid"], seconds["ddp"], START_MUST),
        timed(
            group,
            "python -m recipes.train against that script's ddp",
            seconds["recipes.train"],
            seconds["ddp"],
            START_MUST,
        ),
    ]
