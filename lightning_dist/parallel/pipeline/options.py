"""What a user asks of the pipeline axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_dist.parallel.pipeline.batch_split import BatchSplit, Splitter
from lightning_dist.parallel.pipeline.schedule import schedule_named


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
        """Cuts batches into microbatches."""
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
