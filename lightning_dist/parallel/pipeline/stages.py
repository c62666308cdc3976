"""The stages of a module: what each owns, which of them a rank holds, and how all ranks get what the others hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dist.collectives import broadcast_parts, broadcast_tensors, buckets
from lightning_dist.compat.torch import own_parameters
from lightning_dist.parallel.pipeline.fake_module import FakeModule
from lightning_dist.parallel.pipeline.schedule import PipelineOptions, Schedule, schedule_named
from lightning_dist.placeholder import is_placeholder, placeholder_parameter

Owners = dict[str, tuple[int, ...]]
"""The stages that use something, by its name."""


@dataclass(frozen=True)
class Stages:
    """The stages of a module, the same on every rank.

    Args:
        schedule: which runs them.
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
    owners: Owners
    buffers: Owners
    costs: tuple[float, ...] = field(compare=False, default=())
    equal_costs: tuple[float, ...] = field(compare=False, default=())
    sent: tuple[int, ...] = field(compare=False, default=())

    @property
    def num_stages(self) -> int:
        return len(self.cuts) + 1

    def rank_of(self, stage: int) -> int:
        return self.schedule.rank_of(stage, self.num_ranks)

    def of_rank(self, rank: int) -> list[int]:
        return [stage for stage in range(self.num_stages) if self.rank_of(stage) == rank]

    def holders(self, name: str) -> tuple[int, ...]:
        """The ranks of the pipeline that hold a parameter."""
        return tuple(sorted({self.rank_of(stage) for stage in self.owners[name]}))

    def placeholders(self, module: nn.Module, rank: int) -> list[str]:
        """Names of the parameters that a rank does not hold."""
        return [name for name, _ in module.named_parameters() if rank not in self.holders(name)]

    @property
    def last_rank(self) -> int:
        return self.rank_of(self.num_stages - 1)


@dataclass(frozen=True)
class Pipeline:
    """The stages of all ranks, seen from one of those that run them."""

    stages: Stages
    group: dist.ProcessGroup
    device: torch.device

    @cached_property
    def own(self) -> list[int]:
        """The stages of this rank."""
        return self.stages.of_rank(dist.get_rank(self.group))

    @property
    def has_last(self) -> bool:
        return self.own[-1] == self.stages.num_stages - 1


@dataclass(frozen=True)
class PartitionedModule:
    """What later runs of a module need that has been cut; it holds the stages of a rank of the pipeline."""

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
        """The same cut, run by another schedule; raises a ValueError where that, or the user, has other cuts."""
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


def hide_parameters(module: nn.Module, names: Iterable[str], device: torch.device) -> None:
    """Puts placeholders in place of parameters that other ranks hold; tied ones stay tied. In place."""
    hidden = [module.get_parameter(name) for name in names]
    by_id = {id(parameter): placeholder_parameter(parameter, device) for parameter in hidden}
    for child in module.modules():
        own = own_parameters(child)
        own.update({name: by_id[id(p)] for name, p in own.items() if id(p) in by_id})


@torch.no_grad()
def whole_of_all_stages(
    module: nn.Module, whole: Mapping[str, Tensor], stages: Stages, group: dist.ProcessGroup, device: torch.device
) -> dict[str, Tensor]:
    """The parameters that this rank has a part of, or a placeholder for, whole; the module's buffers get their values.

    Communication over the pipeline: broadcasts of all parameters and of the buffers that stages use, of at most 64 MB
    (or one tensor) each, by the first rank that holds them. ``whole`` is plain, by name, what this rank has parts of.
    """
    names, by_source, found = {}, defaultdict(list), dict(whole)
    for name, parameter in module.named_parameters():
        if name in stages.owners:
            tensor = whole.get(name, parameter)
            names[id(tensor)] = name
            by_source[stages.holders(name)[0]].append(tensor)
    for source, tensors in sorted(by_source.items()):
        mine = dist.get_rank(group) == source
        for same in buckets(tensors):
            sent = [t.detach().to(device) if mine else torch.empty(t.shape, dtype=t.dtype, device=device) for t in same]
            for tensor, part in zip(same, broadcast_parts(sent, group, source), strict=True):
                if is_placeholder(tensor):
                    found[names[id(tensor)]] = part.view(tensor.shape).to("cpu", copy=True)
    share_buffers(module, stages, group)
    return found


def share_buffers(module: nn.Module, stages: Stages, group: dist.ProcessGroup) -> None:
    """Gives every rank the buffers of the stage that uses them, and changes them (BatchNorm's statistics): one
    broadcast of a rank's buffers, flat, over the pipeline.
    """
    buffers = dict(module.named_buffers())
    by_rank = defaultdict(list)
    for name, users in stages.buffers.items():
        if name in buffers:  # else a hook has taken it away
            by_rank[stages.rank_of(users[-1])].append(buffers[name])
    for rank, owned in sorted(by_rank.items()):
        broadcast_tensors(owned, group, rank)
