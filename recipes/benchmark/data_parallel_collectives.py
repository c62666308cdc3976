"""Collectives of a step of the data axes, beside Lightning's ``ddp`` and a loop around ``fully_shard``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from recipes.benchmark.collectives import Collectives, StepCollectives
from recipes.benchmark.competitors import HandWritten, lightning_ddp, ours
from recipes.benchmark.interleaving import no_pace
from recipes.benchmark.results import Line, counted
from recipes.benchmark.workloads import Workload

BYTES_MUST = 1.05
MICRO_STEPS = 4
NUM_BATCHES = 3 * MICRO_STEPS
"""Of a run whose collectives are counted: DDP orders its buckets anew, once, after its first reduction."""


@dataclass(frozen=True)
class CountedRuns:
    """Runs over a layout whose collectives are counted, batch by batch.

    Args:
        workload: what is trained.
        layout: ours.
        replicas: copies of the shards.
        shards: of a copy; where there is one, the peer is ``ddp``.
    """

    workload: Workload
    layout: str
    replicas: int
    shards: int

    @property
    def peer_name(self) -> str:
        """Whom ours is compared with."""
        return "Lightning's ddp" if self.shards == 1 else "fully_shard by hand"

    def ours(self, **options: Any) -> list[Collectives]:
        """Of the product, with options of the Trainer."""
        seen = StepCollectives()
        ours(self.workload, self.layout, options=tuple(options.items()), callbacks=(seen,))(no_pace, NUM_BATCHES)
        return seen.batches

    def peer(self, gradient_clip_val: float | None = None, accumulate_grad_batches: int = 1) -> list[Collectives]:
        """Of the peer, with what these options of the Trainer mean there."""
        if self.shards == 1:
            seen = StepCollectives()
            options = (
                ("gradient_clip_val", gradient_clip_val),
                ("accumulate_grad_batches", accumulate_grad_batches),
            )
            lightning_ddp(self.workload, options=options, callbacks=(seen,))(no_pace, NUM_BATCHES)
            return seen.batches
        counts: list[Collectives] = []

        def count() -> Collectives:
            counts.append(Collectives())
            return counts[-1]

        loop = HandWritten(self.workload, self.replicas, gradient_clip_val, accumulate_grad_batches, None, count)
        loop(no_pace, NUM_BATCHES)
        return counts


def collectives(name: str, runs: CountedRuns) -> Iterator[Line]:
    """Kinds and bytes of a step, what a clip norm adds, and what accumulating micro-steps send of gradients.

    Args:
        name: of the workload.
        runs: of ours and the peer.
    """
    plain, peer = runs.ours()[-1], runs.peer()[-1]
    group, what = f"collectives per step, {runs.layout}", f"{name}, against {runs.peer_name}"
    for operator in sorted({*plain.count, *peer.count}):
        yield counted(group, f"{what}: {operator}", plain.count[operator], peer.count[operator], None)
        both = plain.num_bytes[operator], peer.num_bytes[operator]
        yield counted(group, f"{what}: {operator} bytes", *both, None)
    yield counted(group, f"{what}: bytes of all", plain.num_bytes.total(), peer.num_bytes.total(), BYTES_MUST)
    more = runs.ours(gradient_clip_val=1.0)[-1].count.total() - plain.count.total()
    peer_more = runs.peer(gradient_clip_val=1.0)[-1].count.total() - peer.count.total()
    yield _at_most(group, f"{name}: more for the clip norm", more, peer_more, 0 if runs.shards == 1 else 1)
    accumulating = slice(-MICRO_STEPS, -1)
    yield _at_most(
        group,
        f"{name}: of gradients, on {MICRO_STEPS - 1} accumulating micro-steps",
        sum(map(_of_gradients, runs.ours(accumulate_grad_batches=MICRO_STEPS)[accumulating])),
        sum(map(_of_gradients, runs.peer(accumulate_grad_batches=MICRO_STEPS)[accumulating])),
        0,
    )


def _of_gradients(seen: Collectives) -> int:
    return sum(count for kind, count in seen.count.items() if kind != "all-gather")


def _at_most(group: str, what: str, mine: int, peer: int, limit: int) -> Line:
    """A line whose ratio is over its limit, so that none allowed means none."""
    ratio = 1.0 if mine <= limit else float("inf")
    data = {"ours": mine, "peer": peer, "limit": limit}
    return Line(group, what, str(mine), str(peer), {"over": ratio}, 1.0, data)
