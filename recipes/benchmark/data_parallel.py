"""The data axes: step time, bytes per rank, collectives per step, time to the first step."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from rich.progress import Progress
from torch import Tensor

from lightning_dist.elastic import launch
from recipes.benchmark.agreement import train_alike
from recipes.benchmark.collectives import Collectives, StepCollectives
from recipes.benchmark.competitors import (
    HandWritten,
    free_of_noise,
    lightning_ddp,
    lightning_model_parallel,
    ours,
)
from recipes.benchmark.device import add_device_argument, device_type, join_process_group
from recipes.benchmark.interleaving import Competitor
from recipes.benchmark.memory import HeldBytes
from recipes.benchmark.results import Line, Record, counted, timed
from recipes.benchmark.start import commands, seconds_to_first_step
from recipes.benchmark.turns import add_timing_arguments, progress_bar, take_turns
from recipes.benchmark.workloads import WORKLOADS, Workload

STEP_MUST, BYTES_MUST, START_MUST = 1.02, 1.05, 1.1
MICRO_STEPS = 4
NUM_BATCHES = 3 * MICRO_STEPS
"""Of a run whose collectives are counted: DDP orders its buckets anew, once, after its first reduction."""
QUICK = {"models": ["vit_tiny", "decoder"], "rounds": 10, "steps": 4, "start_rounds": 1}
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
        if "collectives" in options.parts:
            record.extend(_collectives(name, workload, options.ranks))


def _replicate(name: str, workload: Workload, options: argparse.Namespace, progress: Progress) -> Iterator[Line]:
    competitors: dict[str, Competitor] = {
        "ours": ours(workload, f"dp_replicate={options.ranks}"),
        "ddp": lightning_ddp(workload),
        "ddp again": lightning_ddp(workload),
    }
    group = f"step, dp_replicate={options.ranks} ({options.clock} clock, minimum / median)"
    yield from train_alike(
        {kind: competitors[kind] for kind in ("ours", "ddp")}, f"dp_replicate={options.ranks}, {name}"
    )
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
    yield from train_alike(competitors, f"dp_shard={options.ranks}, {name}")
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


def _no_pace(loss: Tensor) -> None:
    """Nobody waits for this competitor."""


def _bytes(name: str, workload: Workload, ranks: int) -> Iterator[Line]:
    """The rank that holds most is shown."""
    group = "bytes per rank, against whole / shards"
    for layout, shards in _layouts(ranks).values():
        held = HeldBytes()
        ours(workload, layout, callbacks=(held,))(_no_pace, 3)
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, held.held)
        for what, whole in held.whole.items():
            most = max(one[what] for one in everyone)
            yield counted(group, f"{name}, {layout}: {what}", most, whole / shards, BYTES_MUST)


def _collectives(name: str, workload: Workload, ranks: int) -> list[Line]:
    lines: list[Line] = []
    for kind, (layout, shards) in _layouts(ranks).items():
        clip = (("gradient_clip_val", 1.0),)
        accumulate = (("accumulate_grad_batches", MICRO_STEPS),)

        def of_fit(make: Callable[..., Competitor], options: tuple[tuple[str, Any], ...] = ()) -> list[Collectives]:
            seen = StepCollectives()
            make(options=options, callbacks=(seen,))(_no_pace, NUM_BATCHES)
            return seen.batches

        def of_loop(replicas: int = ranks // shards, **options: Any) -> list[Collectives]:
            seen: list[Collectives] = []

            def count() -> Collectives:
                seen.append(Collectives())
                return seen[-1]

            HandWritten(workload, replicas, around_step=count, **options)(_no_pace, NUM_BATCHES)
            return seen

        def mine(layout: str = layout, **arguments: Any) -> Competitor:
            return ours(workload, layout, **arguments)

        def ddp(**arguments: Any) -> Competitor:
            return lightning_ddp(workload, **arguments)

        replicated = kind == "replicate"
        plain, peer = of_fit(mine)[-1], of_fit(ddp)[-1] if replicated else of_loop()[-1]
        group = f"collectives per step, {layout}"
        against = "Lightning's ddp" if replicated else "fully_shard by hand"
        for operator in sorted({*plain.count, *peer.count}):
            what = f"{name}, against {against}: {operator}"
            lines.append(counted(group, what, plain.count[operator], peer.count[operator], None))
            lines.append(counted(group, f"{what} bytes", plain.num_bytes[operator], peer.num_bytes[operator], None))
        what = f"{name}, against {against}: bytes of all"
        lines.append(counted(group, what, plain.num_bytes.total(), peer.num_bytes.total(), BYTES_MUST))
        clipped = of_fit(mine, clip)[-1]
        peer_clipped = of_fit(ddp, clip)[-1] if replicated else of_loop(clip_norm=1.0)[-1]
        lines.append(
            _at_most(
                group,
                f"{name}: more for the clip norm",
                _total(clipped) - _total(plain),
                _total(peer_clipped) - _total(peer),
                0 if replicated else 1,
            )
        )
        micro = of_fit(mine, accumulate)[-MICRO_STEPS:-1]
        peer_micro = of_fit(ddp, accumulate) if replicated else of_loop(accumulate=MICRO_STEPS)
        peer_micro = peer_micro[-MICRO_STEPS:-1]
        lines.append(
            _at_most(
                group,
                f"{name}: of gradients, on {MICRO_STEPS - 1} accumulating micro-steps",
                sum(map(_of_gradients, micro)),
                sum(map(_of_gradients, peer_micro)),
                0,
            )
        )
    return lines


def _total(seen: Collectives) -> int:
    return sum(seen.count.values())


def _of_gradients(seen: Collectives) -> int:
    return sum(count for kind, count in seen.count.items() if kind != "all-gather")


def _at_most(group: str, what: str, mine: int, peer: int, limit: int) -> Line:
    """A line whose ratio is over its limit, so that none allowed means none."""
    return Line(
        group,
        what,
        str(mine),
        str(peer),
        {"over": 1.0 if mine <= limit else float("inf")},
        1.0,
        {"ours": mine, "peer": peer, "limit": limit},
    )


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
