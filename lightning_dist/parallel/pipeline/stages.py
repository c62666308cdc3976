"""The stages of a module: what each owns, and which of them a rank holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lightning_dist.parallel.pipeline.fake_module import FakeModule
from lightning_dist.parallel.pipeline.options import PipelineOptions
from lightning_dist.parallel.pipeline.schedule import Schedule, schedule_named


@dataclass(frozen=True)
class Stages:
    """The stages of a module, the same on every rank.

    Args:
        schedule: which runs them.
        num_ranks: of the pipeline.
        cuts: labels of the cut points between them.
        owners: stages that use a parameter, by its name; more than one where it is tied over a cut.
        buffers: stages that use a buffer, by its name.
        costs: of each stage and microbatch, forward and backward, in floating-point operations.
        equal_costs: of the stages if the cut points were dealt by their number instead.
        sent: bytes over each cut and microbatch, one way.
    """

    schedule: Schedule
    num_ranks: int
    cuts: tuple[str, ...]
    owners: dict[str, tuple[int, ...]]
    buffers: dict[str, tuple[int, ...]]
    costs: tuple[float, ...] = field(compare=False, default=())
    equal_costs: tuple[float, ...] = field(compare=False, default=())
    sent: tuple[int, ...] = field(compare=False, default=())

    @property
    def num_stages(self) -> int:
        """Number of stages of all ranks."""
        return len(self.cuts) + 1

    def of_rank(self, rank: int) -> list[int]:
        """The stages that a rank of the pipeline runs."""
        return self.schedule.stages_of(rank, self.num_ranks)

    def holders(self, name: str) -> tuple[int, ...]:
        """The ranks of the pipeline that hold a parameter."""
        return tuple(sorted({self.schedule.rank_of(stage, self.num_ranks) for stage in self.owners[name]}))

    def placeholders(self, module: nn.Module, rank: int) -> list[str]:
        """Names of the parameters that a rank does not hold."""
        return [name for name, _ in module.named_parameters() if rank not in self.holders(name)]

    @property
    def last_rank(self) -> int:
        """The rank of the pipeline that runs the last stage."""
        return self.schedule.rank_of(self.num_stages - 1, self.num_ranks)


@dataclass(frozen=True)
class PartitionedModule:
    """A module that has been cut: what later runs of it need.

    Args:
        fake_module: of the whole module.
        stages: which it was cut into.
        rank: of the pipeline, whose stages the module holds.
    """

    fake_module: FakeModule
    stages: Stages
    rank: int

    def validate_same(self, rank: int, num_ranks: int) -> None:
        """Raises a ValueError where a module that has been cut so is to run elsewhere in a pipeline, or without one."""
        if (self.rank, self.stages.num_ranks) != (rank, num_ranks):
            raise ValueError(
                f"this module holds the stages of rank {self.rank} of pp={self.stages.num_ranks} from an earlier run, "
                f"and this is rank {rank} of pp={num_ranks}; build the module anew and pass ckpt_path= to go on from "
                "its checkpoint"
            )

    def run_by(self, options: PipelineOptions) -> PartitionedModule:
        """The same cut, run by another schedule.

        Raises:
            ValueError: the schedule has other stages, or the user names other cuts.
        """
        wanted, there = schedule_named(options.schedule), self.stages.schedule
        other_cuts = options.cuts is not None and set(options.cuts) != set(self.stages.cuts)
        if (wanted.stages_per_rank, wanted.style) != (there.stages_per_rank, there.style) or other_cuts:
            raise ValueError(
                f"this module was cut for {there.name} after {', '.join(self.stages.cuts)} in an earlier run, and "
                f"{wanted.name}{' after ' + ', '.join(options.cuts or []) if other_cuts else ''} would cut it "
                "elsewhere; build the module anew and pass ckpt_path= to go on from its checkpoint"
            )
        return replace(self, stages=replace(self.stages, schedule=wanted))

    def __deepcopy__(self, _: Any) -> PartitionedModule:
        """Itself: a copy of a module is cut alike."""
        return self
