"""The layouts that are checked, and the groups of ranks that their axes make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from lightning_dist.layout import Layout

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
"""Outermost first, as in the mesh."""

Partition = tuple[tuple[int, ...], ...]
"""All ranks, in the groups that communicate."""


def layouts(num_ranks: int) -> list[str]:
    """Every axis alone and every product of them that so many ranks make, one degree of 2 or more each."""
    found = (over(axes, num_ranks) for count in range(1, len(AXES) + 1) for axes in combinations(AXES, count))
    return [layout for layout in found if layout is not None]


def over(axes: Sequence[str], num_ranks: int) -> str | None:
    """The layout that divides the ranks over these axes, the largest degree innermost; None where that can't be."""
    factors = _prime_factors(num_ranks)
    if len(factors) < len(axes) or not axes:
        return None
    outer = factors[: len(axes) - 1]
    degrees = [*outer, math.prod(factors[len(axes) - 1 :])]
    return ",".join(f"{axis}={degree}" for axis, degree in zip(axes, degrees, strict=True))


def over_any(choices: Sequence[Sequence[str]], num_ranks: int) -> str:
    """The first of these that so many ranks can be divided over; one rank is divided over none, with a degree of 1."""
    found = (layout for axes in choices if (layout := over(axes, num_ranks)) is not None)
    return next(found, f"{choices[-1][0]}={num_ranks}")


def partitions(num_ranks: int) -> dict[Partition, list[str]]:
    """The different groups that axes of these layouts make, each with the axes that make it, as ``"tp of pp=2,tp=2"``.

    Axes with the same ranks communicate alike, whatever their name.
    """
    found: dict[Partition, list[str]] = {}
    for text in layouts(num_ranks):
        layout = Layout.parse(text)
        assert layout is not None
        for axis, degree in layout.items():
            if degree > 1:
                found.setdefault(_groups(layout, axis, num_ranks), []).append(f"{axis} of {text}")
    return found


def _groups(layout: Layout, axis: str, num_ranks: int) -> Partition:
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(num_ranks):
        place = layout.coordinates(rank)
        groups.setdefault(tuple(place[other] for other in AXES if other != axis), []).append(rank)
    return tuple(tuple(ranks) for ranks in groups.values())


def _prime_factors(number: int) -> list[int]:
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors
