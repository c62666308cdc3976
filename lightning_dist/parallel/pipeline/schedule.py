"""The schedules of torch.distributed.pipelining by name, and what else a user asks of the pipeline axis."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_dist.parallel.pipeline.batch_split import BatchSplit, Splitter


@dataclass(frozen=True)
class Schedule:
    """What has to be known of a schedule before it runs.

    Args:
        name: as torch calls it.
        stages_per_rank: how many stages a rank has.
        style: ``"loop"``: the stages go round the ranks; ``"v"``: there and back again.
        least: the fewest microbatches, in multiples of the ranks; 0 for any number.
    """

    name: str
    stages_per_rank: int
    style: str
    least: int

    def num_stages(self, num_ranks: int) -> int:
        return self.stages_per_rank * num_ranks

    def rank_of(self, stage: int, num_ranks: int) -> int:
        turn, place = divmod(stage, num_ranks)
        return num_ranks - 1 - place if self.style == "v" and turn % 2 else place

    def takes(self, num_microbatches: int, num_ranks: int) -> bool:
        """Whether it can run so many microbatches."""
        rounds = max(1, num_microbatches // num_ranks) if "Interleaved" in self.name else 1
        return num_microbatches >= max(1, self.least * num_ranks) and num_microbatches % rounds == 0

    def bubble(self, num_microbatches: int, num_ranks: int) -> float:
        """The share of a step in which a rank waits, if all stages cost the same: (p - 1) / (v m + p - 1).

        Source: Narayanan et al., https://arxiv.org/abs/2104.04473, section 2.2.
        """
        return (num_ranks - 1) / (self.stages_per_rank * num_microbatches + num_ranks - 1)


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("GPipe", 1, "loop", 0),
        Schedule("1F1B", 1, "loop", 1),
        Schedule("LoopedBFS", 2, "loop", 0),
        Schedule("Interleaved1F1B", 2, "loop", 1),
        Schedule("InterleavedZeroBubble", 2, "loop", 1),
        Schedule("ZBVZeroBubble", 2, "v", 1),
        Schedule("DualPipeV", 2, "v", 2),
    )
}


def schedule_named(name: str) -> Schedule:
    """The schedule of a name, in any case; raises a ValueError with the closest names where there is none."""
    known, lower = {other.lower(): schedule for other, schedule in SCHEDULES.items()}, str(name).lower()
    if lower in known:
        return known[lower]
    close = difflib.get_close_matches(lower, [*known], n=1, cutoff=0.4)
    hint = f"; did you mean {known[close[0]].name!r}?" if close else ";"
    raise ValueError(f"pipeline_schedule is {name!r}{hint} The schedules are {', '.join(SCHEDULES)}")


@dataclass(frozen=True)
class PipelineOptions:
    """What a user asks of the pipeline axis; see :class:`~lightning_dist.HybridStrategy`."""

    schedule: str = "1F1B"
    num_microbatches: int | None = None
    cuts: list[str] | None = None
    reshard: bool = False
    batch_split: BatchSplit | None = None
    microbatch_weight: Callable[[Any], Any] | None = None
    check: bool = True
    outputs: bool = True

    def __post_init__(self) -> None:
        schedule_named(self.schedule)
        if self.microbatch_weight is not None and not callable(self.microbatch_weight):
            raise ValueError(f"microbatch_weight is {self.microbatch_weight!r}; it must be a function of a microbatch")
        number: Any = self.num_microbatches
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ValueError(f"num_microbatches is {number!r}; it must be a number of at least 1, or None")
        if isinstance(self.cuts, str):
            raise ValueError(f"pipeline_cuts is {self.cuts!r}; it must be a list of names of modules")

    @property
    def splitter(self) -> Splitter:
        return Splitter(self.batch_split)

    def weights(self, parts: list[Any], sizes: list[int]) -> list[float]:
        """What each microbatch counts in means over them."""
        if self.microbatch_weight is None:
            return [float(size) for size in sizes]
        weights = [float(self.microbatch_weight(part)) for part in parts]
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ValueError(f"microbatch_weight gave {weights}; what microbatches count must not be negative")
        return weights

    def validate(self, num_ranks: int) -> None:
        """Raises a ValueError where the schedule can't run on so many ranks. One microbatch needs no schedule."""
        schedule = schedule_named(self.schedule)
        if self.num_microbatches not in (None, 1) and not schedule.takes(self.num_microbatches, num_ranks):
            fits = [m for m in range(1, 8 * num_ranks + 1) if schedule.takes(m, num_ranks)]
            near = sorted(fits, key=lambda m: abs(m - (self.num_microbatches or 0)))[:3]
            raise ValueError(
                f"{schedule.name} on pp={num_ranks} can't run num_microbatches={self.num_microbatches}; "
                f"{', '.join(map(str, near))} would do, or another pipeline_schedule (GPipe takes any)"
            )
        if self.cuts is not None and len(self.cuts) != schedule.num_stages(num_ranks) - 1:
            raise ValueError(
                f"{schedule.name} on pp={num_ranks} has {schedule.num_stages(num_ranks)} stages, and pipeline_cuts "
                f"names {len(self.cuts)} of the {schedule.num_stages(num_ranks) - 1} cuts between them"
            )

    def microbatches(self, size: int, num_ranks: int) -> int | None:
        """How many microbatches a batch is split into; None if the schedule can't run so few.

        By default four per rank, which leaves a bubble of a fifth at most; fewer if the batch has fewer samples, and
        not of one sample each where it has two for each rank.
        """
        schedule = schedule_named(self.schedule)
        wanted = min(self.num_microbatches or min(4 * num_ranks, max(num_ranks, size // 2)), size)
        return next((m for m in range(wanted, 0, -1) if schedule.takes(m, num_ranks)), None)
