"""Where another step, or one on batches of another shape, is cut so that it fits the stages of the module."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

from lightning_dist.parallel.pipeline.split_points import SplitPoint, label, named_split_points, split_points
from lightning_dist.parallel.pipeline.stages import Stages
from lightning_dist.parallel.pipeline.trace import Trace


def points_in(trace: Trace, stages: Stages) -> list[SplitPoint]:
    """The cuts of the stages in another step, or in the same one on a batch of another shape.

    They have the same names, or, where the step runs a copy of the network, lie where the stages' parameters do.

    Raises:
        ValueError: the step can't be cut there, or uses parameters in a stage that does not hold them.
    """
    there = split_points(trace)
    by_name: list[SplitPoint] | None = None
    if {label(call) for call in trace.calls}.issuperset(stages.cuts):
        by_name = named_split_points(there, list(stages.cuts), trace)
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


def _misplaced(points: list[SplitPoint], trace: Trace, stages: Stages) -> str:
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
