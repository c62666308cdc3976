"""Which stages a module is cut into: split points that balance, and the parameters that each stage uses."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise

import torch
from torch import nn

from lightning_dist.compat.torch import has_backward_hooks
from lightning_dist.parallel.pipeline.schedule import PipelineOptions, Schedule, schedule_named
from lightning_dist.parallel.pipeline.split_points import SplitPoint, named_split_points, obstacles, split_points
from lightning_dist.parallel.pipeline.stages import Owners, Stages
from lightning_dist.parallel.pipeline.trace import Trace


def balanced(points: list[SplitPoint], costs: list[float], num_stages: int) -> list[SplitPoint]:
    """The cut points that make the largest cost of a stage smallest, and among those send the fewest bytes.

    By dynamic programming over stages and points: O(stages x points^2).

    Args:
        points: in the order of the step, at least ``num_stages - 1``.
        costs: of each op.
    """
    until = [0.0, *accumulate(costs)]
    bounds = {-1: 0, **{index: point.after + 1 for index, point in enumerate(points)}, len(points): len(costs)}
    sizes = [*(point.num_bytes for point in points), 0]
    # by the end of the stage: the largest cost so far, the bytes, and the ends
    best: dict[int, tuple[float, int, tuple[int, ...]]] = {-1: (0.0, 0, ())}
    for stage in range(num_stages):
        best = {
            end: min(
                (
                    (max(cost, until[bounds[end]] - until[bounds[begin]]), sent + sizes[end], (*ends, end))
                    for begin, (cost, sent, ends) in best.items()
                    if begin < end
                ),
                key=lambda found: found[:2],
            )
            # each later stage needs a point of its own
            for end in range(stage, len(points) - num_stages + stage + 2)
        }
    return [points[end] for end in best[len(points)][2][:-1]]


def stage_costs(points: list[SplitPoint], costs: list[float]) -> list[float]:
    """Cost of each stage between chosen cut points."""
    bounds = [0, *(point.after + 1 for point in points), len(costs)]
    return [sum(costs[begin:end]) for begin, end in pairwise(bounds)]


EVEN_ENOUGH = 1.1
"""Largest cost of a stage over the mean, above which the network is also cut inside of its blocks."""


def find_stages(
    module: nn.Module,
    trace: Trace,
    options: PipelineOptions,
    num_ranks: int,
    blocks: list[str],
    keep_whole: bool,
    undivided: Iterable[str] = (),
    is_trained: Callable[[str], bool] = lambda _: True,
) -> Stages:
    """Cuts a whole module into the stages of a schedule.

    Args:
        blocks: names of its repeated parts; cuts lie between them if that balances.
        keep_whole: never cut inside of a block, since it is sharded, divided, recomputed or compiled.
        undivided: names of modules whose parameters are held together, since they are divided together.
        is_trained: of a parameter's name, whether an optimizer has it. Of what the step does not use, that is a part
            which other steps may use; what is not trained is a copy (an average, a teacher).

    Raises:
        ValueError: there are fewer split points than needed, or none where the user wants one.
    """
    schedule = schedule_named(options.schedule)
    num_stages = schedule.num_stages(num_ranks)
    hooked = [name for name, child in module.named_modules() if has_backward_hooks(child)]
    between = split_points(trace, [*blocks, *hooked])
    anywhere = between if keep_whole or not blocks else split_points(trace, hooked)
    if options.cuts is not None:
        chosen = sorted(named_split_points(anywhere, options.cuts, trace), key=lambda point: point.after)
    elif len(anywhere) < num_stages - 1:
        raise ValueError(_too_few(module, trace, anywhere, num_stages, schedule, keep_whole and bool(blocks)))
    else:
        chosen = _balanced(between, anywhere, trace.costs, num_stages)
    bounds = [point.after for point in chosen]
    equal = [between[(i + 1) * len(between) // num_stages] for i in range(num_stages - 1)] if between else []
    return Stages(
        schedule,
        num_ranks,
        tuple(point.label for point in chosen),
        _owners_of_parameters(module, _stages_of_use(trace.parameters, bounds), num_stages, undivided, is_trained),
        _owners_of_buffers(module, _stages_of_use(trace.buffers, bounds)),
        tuple(stage_costs(chosen, trace.costs)),
        tuple(stage_costs(equal, trace.costs)),
        tuple(point.num_bytes for point in chosen),
    )


def _balanced(
    between: list[SplitPoint], anywhere: list[SplitPoint], costs: list[float], num_stages: int
) -> list[SplitPoint]:
    """Split points between blocks if those balance, else anywhere."""
    if len(between) >= num_stages - 1:
        chosen = balanced(between, costs, num_stages)
        if max(of_stages := stage_costs(chosen, costs)) <= EVEN_ENOUGH * sum(of_stages) / num_stages:
            return chosen
    return balanced(anywhere, costs, num_stages)


def _stages_of_use(ops: dict[str, set[int]], bounds: list[int]) -> Owners:
    """The stages in which ops lie, by what they use."""
    return {name: tuple(sorted({bisect_left(bounds, op) for op in used})) for name, used in ops.items()}


def _owners_of_parameters(
    module: nn.Module, used: Owners, num_stages: int, undivided: Iterable[str], is_trained: Callable[[str], bool]
) -> Owners:
    shapes, order = _shapes(module), [name for name, _ in module.named_parameters()]
    owners = {
        name: used.get(name) or _like_its_twin(name, used, shapes, is_trained) or _near(name, used, order, num_stages)
        for name in order
    }
    for part in undivided:
        inside = [name for name in owners if name.startswith(f"{part}.")]
        owners.update(dict.fromkeys(inside, tuple(sorted({stage for name in inside for stage in owners[name]}))))
    return owners


def _owners_of_buffers(module: nn.Module, used: Owners) -> Owners:
    """The stages of each buffer that one uses, or that belongs to a copy of such."""
    shapes, unused = _shapes(module), [name for name, _ in module.named_buffers() if name not in used]
    return used | {name: twin for name in unused if (twin := _like_its_twin(name, used, shapes)) is not None}


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def _like_its_twin(
    name: str, used: Owners, shapes: dict[str, torch.Size], is_trained: Callable[[str], bool] = lambda _: False
) -> tuple[int, ...] | None:
    """The stages, for what the step does not use, of what has its shape and ends with the same names, as in a copy of a
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


def _near(name: str, used: Owners, order: list[str], num_stages: int) -> tuple[int, ...]:
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
    module: nn.Module, trace: Trace, points: list[SplitPoint], num_stages: int, schedule: Schedule, whole: bool
) -> str:
    have = ", ".join(point.label for point in points) or "none"
    why = f"The network ({type(module).__name__}) can be cut after: {have}. "
    if trace.open_end:
        why += f"The step asks for the value of a tensor ({trace.open_end}), and what comes after can't be cut. "
    if whole:
        why += "Blocks are not cut inside while they are sharded, divided, recomputed or compiled. "
    return (
        f"pp: {schedule.name} needs {num_stages} stages, so {num_stages - 1} cuts, and there are {len(points)}. {why}"
        f"In the way elsewhere: {obstacles(trace)}. Use fewer ranks of pp, one stage a rank (1F1B), or dp_shard"
    )
