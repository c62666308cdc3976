"""Which stages a module is cut into, what each owns, and what of the module a rank keeps."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from lightning_dist.parallel.pipeline.balance import balanced, stage_costs
from lightning_dist.parallel.pipeline.batches import BatchSplit, Splitter
from lightning_dist.parallel.pipeline.cuts import CutPoint, cut_points, label, named_cuts, obstacles
from lightning_dist.parallel.pipeline.schedule import Schedule, schedule_named
from lightning_dist.parallel.pipeline.skeleton import Skeleton
from lightning_dist.parallel.pipeline.trace import Trace
from lightning_dist.placeholder import is_placeholder, placeholder_parameter

EVEN_ENOUGH = 1.1
"""Largest cost of a stage over the mean, above which the network is also cut inside of its blocks."""


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

    def refuse(self, num_ranks: int) -> None:
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
class Cut:
    """A module that has been cut: what later runs of it need.

    Args:
        skeleton: of the whole module.
        stages: which it was cut into.
        rank: of the pipeline, whose stages the module holds.
    """

    skeleton: Skeleton
    stages: Stages
    rank: int

    def refuse_other(self, rank: int, num_ranks: int) -> None:
        """Raises a ValueError where a module that has been cut so is to run elsewhere in a pipeline, or without one."""
        if (self.rank, self.stages.num_ranks) != (rank, num_ranks):
            raise ValueError(
                f"this module holds the stages of rank {self.rank} of pp={self.stages.num_ranks} from an earlier run, "
                f"and this is rank {rank} of pp={num_ranks}; build the module anew and pass ckpt_path= to go on from "
                "its checkpoint"
            )

    def run_by(self, options: PipelineOptions) -> Cut:
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

    def __deepcopy__(self, _: Any) -> Cut:
        """Itself: a copy of a module is cut alike."""
        return self


def find_stages(
    module: nn.Module,
    trace: Trace,
    options: PipelineOptions,
    num_ranks: int,
    blocks: list[str],
    keep_whole: bool,
    together: Iterable[str] = (),
    is_trained: Callable[[str], bool] = lambda _: True,
) -> Stages:
    """Cuts a module into the stages of a schedule.

    Args:
        module: whole.
        trace: of its step.
        options: the user's.
        num_ranks: of the pipeline.
        blocks: names of its repeated parts; cuts lie between them if that balances.
        keep_whole: never cut inside of a block, since it is sharded, divided, recomputed or compiled.
        together: names of modules whose parameters are held together, since they are divided together.
        is_trained: of a parameter's name, whether an optimizer has it. Of what the step does not use, that is a part
            which other steps may use; what is not trained is a copy (an average, a teacher).

    Raises:
        ValueError: there are fewer cut points than needed, or none where the user wants one.
    """
    schedule = schedule_named(options.schedule)
    num_stages = schedule.num_stages(num_ranks)
    hooked = [name for name, child in module.named_modules() if child._backward_hooks or child._backward_pre_hooks]
    between = cut_points(trace, [*blocks, *hooked])
    anywhere = between if keep_whole or not blocks else cut_points(trace, hooked)
    if options.cuts is not None:
        chosen = sorted(named_cuts(anywhere, options.cuts, trace), key=lambda point: point.after)
    else:
        if len(anywhere) < num_stages - 1:
            raise ValueError(_too_few(module, trace, anywhere, num_stages, schedule, keep_whole and bool(blocks)))
        chosen = balanced(between, trace.costs, num_stages) if len(between) >= num_stages - 1 else []
        costs = stage_costs(chosen, trace.costs)
        if not chosen or max(costs) > EVEN_ENOUGH * sum(costs) / num_stages:
            chosen = balanced(anywhere, trace.costs, num_stages)
    bounds = [point.after for point in chosen]
    used = {name: tuple(sorted({bisect_left(bounds, op) for op in ops})) for name, ops in trace.parameters.items()}
    shapes = {name: p.shape for name, p in (*module.named_parameters(), *module.named_buffers())}
    order = [name for name, _ in module.named_parameters()]
    owners = {
        name: used.get(name) or _like_its_twin(name, used, shapes, is_trained) or _near(name, used, order, num_stages)
        for name in order
    }
    for part in together:
        inside = [name for name in owners if name.startswith(f"{part}.")]
        owners.update(dict.fromkeys(inside, tuple(sorted({stage for name in inside for stage in owners[name]}))))
    buffers = {name: tuple(sorted({bisect_left(bounds, op) for op in ops})) for name, ops in trace.buffers.items()}
    twins = {name: _like_its_twin(name, buffers, shapes) for name, _ in module.named_buffers() if name not in buffers}
    buffers.update({name: stages for name, stages in twins.items() if stages is not None})
    equal = [between[(i + 1) * len(between) // num_stages] for i in range(num_stages - 1)] if between else []
    return Stages(
        schedule,
        num_ranks,
        tuple(point.label for point in chosen),
        owners,
        buffers,
        tuple(stage_costs(chosen, trace.costs)),
        tuple(stage_costs(equal, trace.costs)),
        tuple(point.num_bytes for point in chosen),
    )


def _like_its_twin(
    name: str,
    used: dict[str, tuple[int, ...]],
    shapes: dict[str, torch.Size],
    is_trained: Callable[[str], bool] = lambda _: False,
) -> tuple[int, ...] | None:
    """Of what the step does not use: the stages of what has its shape and ends with the same names, as in a copy of a
    network, so that pairs of both lie on one stage. Blocks of one list are no copies of each other.
    """
    parts = name.split(".")
    for begin in range(1, len(parts) - 1):
        if parts[begin - 1].isdigit():
            return None
        ending = "." + ".".join(parts[begin:])
        for other, stages in used.items():
            if f".{other}".endswith(ending) and shapes.get(other) == shapes[name]:
                return None if is_trained(name) else stages
    return None


def _near(name: str, used: dict[str, tuple[int, ...]], order: list[str], num_stages: int) -> tuple[int, ...]:
    """The stage of a parameter that the step does not use: that of the one before it among its nearest relatives, in
    the order in which they were made; else the last.
    """
    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:depth]) + "."
        relatives = [other for other in order if other.startswith(prefix) and (other in used or other == name)]
        if len(relatives) > 1:
            place = relatives.index(name)
            return (max(used[relatives[place - 1]]) if place else min(used[relatives[1]]),)
    return (num_stages - 1,)


def _too_few(
    module: nn.Module, trace: Trace, points: list[CutPoint], num_stages: int, schedule: Schedule, whole: bool
) -> str:
    stage_word = f"{schedule.name} needs {num_stages} stages"
    have = ", ".join(point.label for point in points) or "none"
    why = f"The network ({type(module).__name__}) can be cut after: {have}. "
    if trace.open_end:
        why += f"The step asks for the value of a tensor ({trace.open_end}), and what comes after can't be cut. "
    inside = "Blocks are not cut inside while they are sharded, divided, recomputed or compiled. " if whole else ""
    return (
        f"pp: {stage_word}, so {num_stages - 1} cuts, and there are {len(points)}. {why}{inside}"
        f"In the way elsewhere: {obstacles(trace)}. Use fewer ranks of pp, one stage a rank (1F1B), or dp_shard"
    )


def points_in(trace: Trace, stages: Stages) -> list[CutPoint]:
    """The cuts of the stages in another step, or in the same one on a batch of another shape.

    They have the same names, or, where the step runs a copy of the network, lie where the stages' parameters do.

    Raises:
        ValueError: the step can't be cut there, or uses parameters in a stage that does not hold them.
    """
    there = cut_points(trace)
    by_name: list[CutPoint] | None = None
    if {label(call) for call in trace.calls}.issuperset(stages.cuts):
        by_name = named_cuts(there, list(stages.cuts), trace)
    if by_name is None or _misplaced(by_name, trace, stages):
        by_owner = _between_owners(there, trace, stages)
        if by_owner is not None and not _misplaced(by_owner, trace, stages):
            return by_owner
    if by_name is None:
        called = {label(call) for call in trace.calls}
        raise ValueError(
            f"pp: this step does not run {', '.join(cut for cut in stages.cuts if cut not in called)}, after which the "
            "network is cut, and can't be cut elsewhere so that each stage has what it uses; name pipeline_cuts that "
            "all steps have, or use another axis"
        )
    points = by_name
    if why := _misplaced(points, trace, stages):
        raise ValueError(why)
    return points


def _misplaced(points: list[CutPoint], trace: Trace, stages: Stages) -> str:
    """Why a step can't be cut there; empty if it can."""
    if any(point.after >= later.after for point, later in pairwise(points)):
        return f"pp: this step runs the network in another order than it is cut: {', '.join(stages.cuts)}"
    bounds = [point.after for point in points]
    for name, ops in trace.parameters.items():
        for op in ops:
            stage = bisect_left(bounds, op)
            if stages.schedule.rank_of(stage, stages.num_ranks) not in stages.holders(name):
                return (
                    f"pp: this step uses {name} in stage {stage}, and the training step, by which parameters were "
                    f"dealt, uses it in stage {stages.owners[name][0]}; name pipeline_cuts that fit both"
                )
    return ""


def _between_owners(there: list[CutPoint], trace: Trace, stages: Stages) -> list[CutPoint] | None:
    """Cuts after all that uses parameters of the stages before, and before what uses those of the stages after."""
    found: list[CutPoint] = []
    for cut in range(stages.num_stages - 1):
        before = [op for name, ops in trace.parameters.items() if max(stages.owners[name]) <= cut for op in ops]
        after = [op for name, ops in trace.parameters.items() if min(stages.owners[name]) > cut for op in ops]
        begin, end = max(before, default=0), min(after, default=trace.num_ops)
        between = [p for p in there if begin <= p.after < end and (not found or p.after > found[-1].after)]
        if not between:
            return None
        found.append(min(between, key=lambda point: point.num_bytes))
    return found


def hide_parameters(module: nn.Module, names: list[str], device: torch.device) -> None:
    """Puts placeholders in place of parameters that other ranks hold; tied ones stay tied. In place."""
    hidden = {id(module.get_parameter(name)) for name in names}
    standins: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is None or id(parameter) not in hidden or is_placeholder(parameter):
                continue
            if id(parameter) not in standins:
                standins[id(parameter)] = placeholder_parameter(parameter, device)
            child._parameters[name] = standins[id(parameter)]
