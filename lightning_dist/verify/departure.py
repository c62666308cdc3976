"""The first module, in the order of execution, whose output or gradient is not that of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from lightning_dist.layout import Layout
from lightning_dist.verify.activations import Activations, Place
from lightning_dist.verify.distances import SMALL, distance, largest_norm

PACKED = (1, 2, 3)
"""Into how many pieces, of each of which a rank of ``tp`` has its part, an activation is cut: a gate and values; q, k
and v."""


@dataclass(frozen=True)
class Departure:
    """Where the numbers depart.

    Args:
        kind: of what departs: ``"input"``, ``"output"``, ``"gradient"``, ``"weight gradient"``, ``"weight"``,
            ``"buffer"``, ``"logged value"``, ``"validation value"``, ``"batch"``, or ``"loss"``.
        name: of the module, the weight or the value.
        sentence: what is seen there.
        relative: difference.
    """

    kind: str
    name: str
    sentence: str
    relative: float


@dataclass(frozen=True)
class Shares:
    """One call's tensor on all ranks: by rank of ``tp``, by data rank, by microbatch."""

    parts: list[list[list[Tensor]]]
    mean: bool = False
    """The tensors are gradients of a mean over the data ranks."""

    def distance(self, whole: Tensor, floor: float) -> tuple[float, Tensor] | None:
        """The relative distance from the tensor of one process, and what is that far away; None where it can't be said.

        Of all ways in which the shares may make the whole, the closest counts: samples joined along some dim, or each
        of them all; parts of ``tp`` joined along a dim, or alike on all, or (of gradients) terms of a sum.
        """
        by_rank = [list(self._over_samples(parts, whole)) for parts in self.parts]
        found = list(self._over_tensor_axis(by_rank, whole))
        measured = [(distance(candidate, whole, floor), candidate) for candidate in found]
        return min(measured, key=lambda pair: pair[0], default=None)

    def _over_samples(self, parts: list[list[Tensor]], whole: Tensor) -> Iterator[Tensor]:
        scale = 1 / len(parts) if self.mean else 1.0
        flat = [part * scale if part.is_floating_point() else part for of_rank in parts for part in of_rank]
        if len(flat) == 1:
            yield flat[0]
            return
        for dim in range(whole.ndim):
            shapes = {(*part.shape[:dim], *part.shape[dim + 1 :]) for part in flat}
            fits = all(part.ndim == whole.ndim for part in flat) and len(shapes) == 1
            if fits and sum(part.shape[dim] for part in flat) == whole.shape[dim]:
                yield torch.cat(flat, dim)
        if all(part.shape == whole.shape for part in flat):
            stacked = torch.stack(flat)
            if self.mean:
                yield stacked.sum(dim=0)
            elif not whole.ndim:
                yield stacked.mean(dim=0) if stacked.is_floating_point() else stacked[0]
            else:
                yield max(flat, key=lambda part: distance(part, whole, 0.0))

    def _over_tensor_axis(self, by_rank: list[list[Tensor]], whole: Tensor) -> Iterator[Tensor]:
        for parts in zip(*by_rank, strict=False):
            if all(part.shape == whole.shape for part in parts):
                yield max(parts, key=lambda part: distance(part, whole, 0.0))
                if self.mean and len(parts) > 1:
                    yield torch.stack(parts).sum(dim=0)
            elif len(parts) > 1:
                yield from _joined_parts(parts, whole)


def _joined_parts(parts: Sequence[Tensor], whole: Tensor) -> Iterator[Tensor]:
    if any(part.ndim != whole.ndim for part in parts):
        return
    for dim in reversed(range(whole.ndim)):
        sizes = [part.shape[dim] for part in parts]
        others = {(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}
        if sum(sizes) != whole.shape[dim] or others != {(*whole.shape[:dim], *whole.shape[dim + 1 :])}:
            continue
        for packed in {*PACKED, whole.shape[0]} if whole.ndim else PACKED:
            if packed and not any(size % packed for size in sizes):
                pieces = [part.unflatten(dim, (packed, -1)) for part in parts]
                yield torch.cat(pieces, dim + 1).flatten(dim, dim + 1)


def first_departure(
    one: Activations, ranks: Sequence[Activations], layout: Layout, tolerance: float
) -> Departure | None:
    """The first output, in the order of the forward pass, and else gradient, in that of the backward, that departs.

    Args:
        one: of one process.
        ranks: of the layout's ranks, in their order.
        layout: resolved.
        tolerance: relative difference that is rounding.
    """
    walk = _Walk(one, ranks, layout, tolerance)
    return walk.first_output() or walk.first_gradient()


_Getter = Callable[[Activations], dict[Place, dict[int, Tensor]]]


class _Walk:
    def __init__(self, one: Activations, ranks: Sequence[Activations], layout: Layout, tolerance: float) -> None:
        self._one, self._tolerance = one, tolerance
        self._ranks, self._layout = ranks, layout

    def first_output(self) -> Departure | None:
        get: _Getter = attrgetter("outputs")
        floor = _floor(self._one.outputs)
        scalars: Departure | None = None
        for place, call in self._one.outputs_in_order:
            away = self._departs(get, place, call, floor, mean=False)
            if away is None:
                continue
            found = self._told(place, call, *away, what="output")
            if self._one.outputs[place][call].ndim:
                return self._given(place[0], call) or found
            scalars = scalars or found  # a mean of means, which may be none of the network's
        return scalars

    def _given(self, name: str, call: int) -> Departure | None:
        """What the module of the first output that departs was given, where that departs already."""
        get: _Getter = attrgetter("inputs")
        floor = _floor(self._one.inputs)
        for place, calls in self._one.inputs.items():
            if place[0] == name and call in calls and calls[call].ndim:
                away = self._departs(get, place, call, floor, mean=False)
                if away is not None:
                    return self._told(place, call, *away, what="input")
        return None

    def first_gradient(self) -> Departure | None:
        get: _Getter = attrgetter("gradients")
        floor = _floor(self._one.gradients)
        order = self._one.gradients_in_order
        for number, (place, call) in enumerate(order):
            away = self._departs(get, place, call, floor, mean=True)
            if away is not None:
                place, call = self._user_of(order[number:])
                return self._told(place, call, *away, what="gradient")
        return None

    def _user_of(self, order: list[tuple[Place, int]]) -> tuple[Place, int]:
        """Where a tensor is what a module was given, that module, which made its gradient; else who returned it."""
        first = self._one.gradients[order[0][0]][order[0][1]]
        for place, call in order:
            gradient = self._one.gradients[place][call]
            if gradient.shape != first.shape or not torch.equal(gradient, first):
                break
            if place[1] == "input":
                return place, call
        return order[0]

    def _departs(
        self,
        get: _Getter,
        place: Place,
        call: int,
        floor: float,
        mean: bool,
    ) -> tuple[float, float | None] | None:
        """The distance, and how many times the whole it is; None where nothing departs, or nothing can be said."""
        whole, worst = get(self._one)[place][call], None
        for stage in range(self._layout.pp):
            shares = self._shares(get, stage, place, call, len(get(self._one)[place]), mean)
            found = None if shares is None else shares.distance(whole, floor)
            if found is not None and found[0] > self._tolerance and (worst is None or found[0] > worst[0]):
                worst = found[0], times(found[1], whole)
        return worst

    def _shares(
        self,
        get: _Getter,
        stage: int,
        place: Place,
        call: int,
        calls: int,
        mean: bool,
    ) -> Shares | None:
        parts: dict[int, dict[int, list[Tensor]]] = {}
        for rank, activations in enumerate(self._ranks):
            where = self._layout.coordinates(rank)
            if where["pp"] != stage:
                continue
            held = get(activations).get(place, {})
            number = max(held, default=-1) + 1
            if not held or len(held) != number or number % calls or (number != calls and self._layout.pp == 1):
                return None  # on another stage; or not called as often, of which nothing can be said
            of_data = parts.setdefault(where["tp"], {})
            of_data[self._layout.data_rank(rank)] = [held[i] for i in range(call, number, calls)]
        by_rank = [[held for _, held in sorted(of_data.items())] for _, of_data in sorted(parts.items())]
        return Shares(by_rank, mean) if by_rank else None

    def _told(self, place: Place, call: int, relative: float, factor: float | None, what: str) -> Departure:
        name, side, _ = place
        kind = self._one.kinds[name]
        which = f" (call {call + 1})" if call else ""
        size = f"it is {factor:.3g} times as large" if factor is not None else f"relative difference {relative:.1e}"
        if what == "output":
            sentence = f"the output of {name} ({kind}){which} departs first: {size}"
        elif what == "input":
            sentence = (
                f"what {name} ({kind}){which} is given departs already, before the output of any module, so it is the "
                f"code that calls it: {size}"
            )
        elif side == "input":
            sentence = f"no output departs; the gradient that {name} ({kind}){which} hands back departs first: {size}"
        else:
            sentence = (
                f"no output departs; the gradient that reaches the output of {name} ({kind}){which} departs first, so "
                f"it is what comes after: {size}"
            )
        return Departure(what, name, sentence, relative)


def _floor(found: dict[Place, dict[int, Tensor]]) -> float:
    return SMALL * largest_norm(tensor for calls in found.values() for tensor in calls.values())


def times(mine: Tensor, whole: Tensor) -> float | None:
    """The number by which all of a tensor is multiplied; None where there is no such."""
    if mine.shape != whole.shape or not whole.is_floating_point():
        return None
    mine, whole = mine.double().flatten(), whole.double().flatten()
    square = float(whole @ whole)
    if not square:
        return None
    factor = float(mine @ whole) / square
    return factor if float((mine - factor * whole).norm()) <= 1e-6 * float(whole.norm()) * abs(factor) else None
