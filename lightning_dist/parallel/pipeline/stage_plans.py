"""How a step goes through the stages: found by tracing it, and kept for steps that go alike."""

from __future__ import annotations

from bisect import bisect_left
from functools import cached_property
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_dist.parallel.pipeline.batch_split import Splitter
from lightning_dist.parallel.pipeline.guards import AddGuard, GuardedInt, flags_of
from lightning_dist.parallel.pipeline.p2p import with_numbers
from lightning_dist.parallel.pipeline.split_points import SplitPoint, label, named_split_points, split_points
from lightning_dist.parallel.pipeline.stage_forward import RecordedForward, StageForward
from lightning_dist.parallel.pipeline.stage_owner import origin
from lightning_dist.parallel.pipeline.stages import PartitionedModule, Stages
from lightning_dist.parallel.pipeline.trace import Trace
from lightning_dist.parallel.pipeline.tracing import refuse_manual, trace_step
from lightning_dist.pytree import deep_leaves
from lightning_dist.random_states import kept_random_states


class StagePlan:
    """A step on microbatches of one shape: where it is cut, and how each stage runs it."""

    def __init__(self, points: list[SplitPoint], trace: Trace, flags: tuple[Any, ...]) -> None:
        ends: list[SplitPoint | None] = [None, *points, None]
        self.points = points
        self.forwards = [StageForward(trace, entry, exit) for entry, exit in pairwise(ends)]
        self.written = trace.written
        self.attributes = set(trace.attributes)
        self.called = {call.name for call in trace.calls}
        self.path = frozenset(self.called), flags, tuple(answer for _, answer in trace.guards)
        """What tells it from other paths of the same kind of step: the modules that it runs, the module's flags, and
        what it was told."""
        bounds = [point.after for point in points]
        self.users = {name: {bisect_left(bounds, op) for op in ops} for name, ops in trace.parameters.items()}
        """Stages that use a parameter, by its name."""
        self._trace = trace

    @cached_property
    def without_modules(self) -> RecordedForward:
        """The step without its modules; for a manual one."""
        return RecordedForward(self._trace)

    @property
    def guards_hold(self) -> bool:
        """Whether the step would take the same path now; see [Note: a path that changes]."""
        try:
            return all(question() == answer for question, answer in self._trace.guards)
        except (AttributeError, LookupError):  # what was asked of is gone
            return False


class StagePlans:
    """The plans of a module's steps: one for each kind of step, shape of microbatch, and path."""

    def __init__(self, module: pl.LightningModule, partitioned: PartitionedModule, device: torch.device) -> None:
        self._module, self._device = module, device
        self._fake_module, self._stages = partitioned.fake_module, partitioned.stages
        self._known: dict[Any, list[StagePlan]] = {}
        self._constants: dict[tuple[str, str], bool] = {}
        self._others: tuple[Any, ...] = ()
        """The arguments of the step that runs, beside the batch."""

    def of(self, step: str, parts: list[Any], others: tuple[Any, ...]) -> list[StagePlan]:
        """The plan of each microbatch; raises a ValueError where the step can't be cut as the module is."""
        self._others = others
        flags = flags_of(self._module)
        return [self._one(step, part, flags) for part in parts]

    def logs_constant(self, splitter: Splitter, step: str, batch: Any, others: tuple[Any, ...], name: str) -> bool:
        """Whether the step logs one Python number under a name for one sample of a batch and for two, so for any."""
        if (step, name) not in self._constants:
            logged = []
            with kept_random_states(self._device):
                for count in (1, 2):
                    trace_step(self._fake_module, self._module, step, splitter.first(batch, count), others)
                    logged.append(self._fake_module.logged.get(name))
            self._constants[step, name] = logged[0] == logged[1]
        return self._constants[step, name]

    def _one(self, step: str, part: Any, flags: tuple[Any, ...]) -> StagePlan:
        others = self._others[1:]  # the loader's index, not the batch's
        key = step, self._module.training, _signature(part), others, flags
        known = self._known.pop(key, [])
        found = next((plan for plan in known if plan.guards_hold), None)
        if found is None:
            found = self._traced(step, part, flags)
            known = [found, *known][:_MANY]
        self._known[key] = known  # the last used at the end
        for outdated in list(self._known)[: max(0, len(self._known) - _MANY * _MANY)]:
            del self._known[outdated]
        return found

    def _traced(self, step: str, part: Any, flags: tuple[Any, ...]) -> StagePlan:
        self._own_new()
        with kept_random_states(self._device):
            trace = trace_step(self._fake_module, self._module, step, part, self._guarded_others)
        if step == "training_step":
            refuse_manual(self._module, self._fake_module, trace)
        points = [with_numbers(trace, point) for point in points_in(trace, self._stages)]
        return StagePlan(points, trace, flags)

    def _guarded_others(self, guard: AddGuard) -> tuple[Any, ...]:
        """The step's other arguments; what is asked of the batch's index becomes a guard."""
        if not self._others or type(self._others[0]) is not int:
            return self._others
        return (GuardedInt(lambda: self._others[0], guard), *self._others[1:])

    def _own_new(self) -> None:
        """Parameters that hooks gave the module: a copy is where its original is, and others must not train."""
        owners = self._stages.owners
        for name, parameter in self._module.named_parameters():
            if name in owners:
                continue
            if (original := origin(parameter)) in owners:
                owners[name] = owners[original]
            elif parameter.requires_grad:
                raise ValueError(
                    f"pp: {name} came to the module during the fit, and no stage has it; make it before "
                    "(in __init__, setup or configure_model), where the network is cut"
                )
            else:
                owners[name] = tuple(range(self._stages.num_stages))


_MANY = 8
"""Paths of one kind, and the root of the number of kinds, that are kept."""


def _signature(part: Any) -> Any:
    """What a step's path may depend on beside values: shapes and dtypes, and what is no tensor."""

    def described(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return tuple(leaf.shape), leaf.dtype
        return type(leaf).__name__, leaf if isinstance(leaf, (bool, int, type(None))) else None

    return tuple(map(described, deep_leaves(part)))


def points_in(trace: Trace, stages: Stages) -> list[SplitPoint]:
    """The cuts of the stages in another step, or in the same one on a batch of another shape.

    They have the same names, or, where the step runs a copy of the network, lie where the stages' parameters do.

    Raises:
        ValueError: the step can't be cut there, or uses parameters in a stage that does not hold them.
    """
    there, called = split_points(trace), {label(call) for call in trace.calls}
    if missing := [cut for cut in stages.cuts if cut not in called]:
        why = (
            f"pp: this step does not run {', '.join(missing)}, after which the network is cut, and can't be cut "
            "elsewhere so that each stage has what it uses; name pipeline_cuts that all steps have, or use another axis"
        )
    else:
        by_name = named_split_points(there, list(stages.cuts), trace)
        why = _misplaced(by_name, trace, stages)
        if not why:
            return by_name
    by_owner = _between_owners(there, trace, stages)
    if by_owner is None or _misplaced(by_owner, trace, stages):
        raise ValueError(why)
    return by_owner


def _misplaced(points: list[SplitPoint], trace: Trace, stages: Stages) -> str:
    """Why a step can't be cut there; empty if it can."""
    if any(point.after >= later.after for point, later in pairwise(points)):
        return f"pp: this step runs the network in another order than it is cut: {', '.join(stages.cuts)}"
    bounds = [point.after for point in points]
    for name, ops in trace.parameters.items():
        for op in ops:
            stage = bisect_left(bounds, op)
            if stages.rank_of(stage) not in stages.holders(name):
                return (
                    f"pp: this step uses {name} in stage {stage}, and the training step, by which parameters were "
                    f"dealt, uses it in stage {stages.owners[name][0]}; name pipeline_cuts that fit both"
                )
    return ""


def _between_owners(there: list[SplitPoint], trace: Trace, stages: Stages) -> list[SplitPoint] | None:
    """Cuts after all that uses parameters of the stages before, and before what uses those of the stages after."""
    found: list[SplitPoint] = []
    for cut in range(stages.num_stages - 1):
        before = [op for name, ops in trace.parameters.items() if max(stages.owners[name]) <= cut for op in ops]
        after = [op for name, ops in trace.parameters.items() if min(stages.owners[name]) > cut for op in ops]
        begin, end = max(before, default=0), min(after, default=trace.num_ops)
        between = [p for p in there if begin <= p.after < end and (not found or p.after > found[-1].after)]
        if not between:
            return None
        found.append(min(between, key=lambda point: point.num_bytes))
    return found
