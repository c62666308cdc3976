"""Split points of a step: after a module whose outputs are all that is still needed of what came before."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_dist.compat.torch import memory_of
from lightning_dist.parallel.pipeline.trace import Call, Trace, Value
from lightning_dist.pytree import deep_tensors


@dataclass(frozen=True)
class BoundaryTensor:
    """A tensor that is sent over a cut.

    Args:
        tensor: its placeholder in the trace.
        call: index of the call that returned it.
        place: which of the tensors that the call returned.
        changed: whether it is changed in place after the cut.
    """

    tensor: Tensor
    call: int
    place: int
    changed: bool


@dataclass(frozen=True)
class SplitPoint:
    """The end of a module's call, where one stage can leave and the next one enter.

    Args:
        name: of the module.
        ordinal: which of its calls in a step, from 0.
        call: index of that call.
        after: number of the last op before the cut.
        boundary: what is sent: outputs of this call, and of earlier ones that are used later still.
        numbers: what the last boundary tensor holds, where it has no call; see [Note: numbers over a cut].
    """

    name: str
    ordinal: int
    call: int
    after: int
    boundary: tuple[BoundaryTensor, ...]
    numbers: tuple[Any, ...] = ()

    @property
    def label(self) -> str:
        return label(self)

    @property
    def num_bytes(self) -> int:
        """Sent per microbatch, and sent back in the backward."""
        return sum(item.tensor.nbytes for item in self.boundary)


def split_points(trace: Trace, whole: Collection[str] = ()) -> list[SplitPoint]:
    """Every place where the step can be cut, in the order of the step; one for each op.

    A cut point is the end of a module's call after which, of all tensors that depend on a parameter, only those are
    used that this call or earlier ones returned. Not one, though: where a tensor of an earlier call was changed in
    place since; where two share memory and one is changed later; inside of a reentrant ``torch.utils.checkpoint``,
    where activations have no graph; and where a number drawn after the network began is used later, since a later
    stage skips what was drawn before it. ``whole`` are names of modules that must not be cut inside: those that are
    sharded, divided, recomputed or compiled.
    """
    inside = tuple(f"{name}." for name in whole)
    found: dict[int, tuple[tuple[int, bool, int], SplitPoint]] = {}
    ends = _used_across(trace, {call.last for call in trace.calls})
    returned = _returned(trace)
    for index, call in enumerate(trace.calls):
        if call.last < 0 or call.recomputed or not ends[call.last] or call.name.startswith(inside):
            continue
        boundary = _boundary(trace, returned, index, ends[call.last])
        if boundary is None or _uses_draws(trace, call.last):
            continue
        point = SplitPoint(call.name, call.ordinal, index, call.last, tuple(boundary))
        own = sum(c.call == index for c in boundary)
        rank = (-own, call.name not in whole, index)  # a block, else the outermost
        if own and (call.last not in found or rank < found[call.last][0]):
            found[call.last] = rank, point
    return [point for _, (_, point) in sorted(found.items())]


def _returned(trace: Trace) -> dict[int, list[tuple[int, int]]]:
    """Which calls returned a tensor, by its id: index and place, the outermost first."""
    returned = defaultdict(list)
    for index, call in enumerate(trace.calls):
        for place, tensor in enumerate(deep_tensors(call.output)):
            returned[id(tensor)].append((index, place))
    return returned


def _boundary(
    trace: Trace, returned: dict[int, list[tuple[int, int]]], index: int, values: list[Value]
) -> list[BoundaryTensor] | None:
    """What is sent over a cut after a call; None if something else is used later."""
    after = trace.calls[index].last
    if _shares_changes(values, after):
        return None
    skipped = skipped_indices(trace, index)
    boundary = []
    for value in values:
        places = returned.get(id(value.tensor), [])
        at = next((place for place in places if place[0] == index), None)
        if at is None:
            at = next((p for p in places if p[0] in skipped and not trace.calls[p[0]].recomputed), None)
            if at is None or value.mutated > trace.calls[at[0]].last:
                return None
        boundary.append(BoundaryTensor(value.tensor, *at, changed=value.mutated > after))
    return boundary


def skipped_indices(trace: Trace, entered: int) -> set[int]:
    """Calls that a stage which enters after a call need not run, without those inside of them.

    Those that ended before it and returned only placeholders and plain values: what depends on no parameter is
    computed on every stage that may need it.
    """
    around = {entered, *trace.around(entered)}
    skipped: set[int] = set()
    inside: set[int] = set()
    for index, call in enumerate(trace.calls):
        if call.parent in inside:
            inside.add(index)
        elif call.last <= trace.calls[entered].last and index not in around and call.returns_placeholders:
            skipped.add(index)
            inside.add(index)
    return skipped


def named_split_points(points: list[SplitPoint], names: list[str], trace: Trace) -> list[SplitPoint]:
    """The cut points of these names, in their order; raises a ValueError for one that is no module of the step, or
    after which it can't be cut, with the reason.
    """
    called = {label(call): call for call in trace.calls}
    return [_named(points, name, called, trace) for name in names]


def _named(points: list[SplitPoint], name: str, called: dict[str, Call], trace: Trace) -> SplitPoint:
    by_name = next((p for p in points if p.label == name), None)
    if by_name is not None:
        return by_name
    if name not in called:
        close = difflib.get_close_matches(name, [*called], n=3)
        hint = f"; the closest are {', '.join(close)}" if close else ""
        raise ValueError(f"pipeline_cuts names {name!r}, which the step does not call{hint}")
    call = called[name]
    for point in points:
        if point.after == call.last:  # another module ends with the same op
            return point
    nearest = sorted(points, key=lambda p: abs(p.after - call.last))[:3]
    raise ValueError(
        f"pipeline_cuts names {name!r}, after which the step can't be cut: {obstacle(trace, call)}. "
        f"Cut points near it: {', '.join(p.label for p in nearest) or 'none'}"
    )


def label(call: Call | SplitPoint) -> str:
    """As a user names a call."""
    return call.name if not call.ordinal else f"{call.name}#{call.ordinal}"


def obstacle(trace: Trace, call: Call) -> str:
    """Why a step can't be cut after a call, with the tensors that stand in the way."""
    boundary = _used_across(trace, {call.last})[call.last]
    if call.recomputed:
        return (
            "it runs inside of torch.utils.checkpoint(use_reentrant=True), which gives activations no graph: use "
            "use_reentrant=False, or activation_checkpointing= of the strategy"
        )
    if not boundary:
        return "nothing that depends on a parameter is used after it"
    index = next(i for i, other in enumerate(trace.calls) if other is call)
    returned = _returned(trace)
    others = [value for value in boundary if _boundary(trace, returned, index, [value]) is None]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        return "; ".join(_described(trace, value) for value in others[:3]) + more
    if _uses_draws(trace, call.last):
        return "random numbers drawn before it are used after it"
    if _shares_changes(boundary, call.last):
        return "its outputs share memory, and are changed in place after it"
    return "it lies inside of a block that stays whole"


def obstacles(trace: Trace) -> str:
    """What stands in the way of cutting a step at all: at the calls that come closest."""
    ends = _used_across(trace, {call.last for call in trace.calls})
    returned = _returned(trace)
    parents = {call.parent for call in trace.calls}
    near = []
    for index, call in enumerate(trace.calls):
        if call.last >= 0 and index not in parents and ends[call.last]:
            missing = sum(_boundary(trace, returned, index, [value]) is None for value in ends[call.last])
            if missing or call.recomputed:
                near.append((missing, index, call))
    if not near:
        return "no module of it returns what the next one takes"
    return "; ".join(f"after {label(call)!r}: {obstacle(trace, call)}" for _, _, call in sorted(near)[:3])


def _described(trace: Trace, value: Value) -> str:
    def module_at(number: int) -> str:
        """The innermost module in which an op ran."""
        inside = [call for call in trace.calls if call.first <= number <= call.last]
        return repr(inside[-1].name) if inside else "the step"

    kind = str(value.tensor.dtype).removeprefix("torch.")
    user = module_at(value.used) if value.used < trace.num_ops else "the loss"
    return f"{kind}{list(value.tensor.shape)} made in {module_at(value.made)} is used in {user}"


def _used_across(trace: Trace, ends: set[int]) -> dict[int, list[Value]]:
    """What depends on a parameter, was made by an op, and is used later; by op."""
    begins = defaultdict(list)
    for value in trace.values.values():
        if value.used > value.made:
            begins[value.made].append(value)
    alive: list[Value] = []
    boundary: dict[int, list[Value]] = {-1: []}
    for number in range(trace.num_ops):
        alive = [value for value in alive if value.used > number] + begins[number]
        if number in ends:
            boundary[number] = alive
    return boundary


def _shares_changes(boundary: list[Value], after: int) -> bool:
    memory = [memory_of(value.tensor) for value in boundary]
    changed = {m for value, m in zip(boundary, memory, strict=True) if value.mutated > after}
    return any(memory.count(m) > 1 for m in changed)


def _uses_draws(trace: Trace, after: int) -> bool:
    start = min((op for ops in trace.parameters.values() for op in ops), default=0)
    first = next((draw for draw in trace.draws if draw >= start), None)
    if first is None:
        return False
    return any(first < value.made <= after < value.used for value in trace.drawn.values())


def skipped_calls(trace: Trace, point: SplitPoint) -> dict[str, dict[int, Any]]:
    """What modules return that a stage entering at a cut need not run: by name and call, their recorded outputs."""
    skipped: dict[str, dict[int, Any]] = defaultdict(dict)
    for index in skipped_indices(trace, point.call):
        call = trace.calls[index]
        skipped[call.name][call.ordinal] = call.output
    return skipped
