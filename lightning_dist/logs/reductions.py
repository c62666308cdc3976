"""The reductions of ``self.log(..., reduce_fx=)``: how values under one name become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Reduction:
    """How values become one; all that the package knows of a reduction.

    Args:
        neutral: a value that changes nothing.
        combine: of values of one shape and their weights, the one that they become.
        is_weighted: whether values travel times their weight, and weights beside them, in the sum of all names.
        extreme: the all-reduce that it needs beside that sum; None where it is a sum itself.
        adds_up: whether what is logged once for each part of a batch counts as often.
    """

    neutral: float
    combine: Callable[[Sequence[Tensor], Sequence[float]], Tensor]
    is_weighted: bool = False
    extreme: dist.ReduceOp.RedOpType | None = None
    adds_up: bool = False


def _weighted_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Values of weight 0 may be nan; the last value where there is no weight at all."""
    total = sum(weights)
    if len(values) == 1 or not total:
        return values[-1]
    wide = sum(v.double() * (weight / total) for v, weight in zip(values, weights, strict=True) if weight)
    assert isinstance(wide, Tensor)
    return wide.to(values[0].dtype) if values[0].is_floating_point() else wide.float()


REDUCTIONS = {
    "mean": Reduction(0.0, _weighted_mean, is_weighted=True),
    "sum": Reduction(0.0, lambda values, _: torch.stack([*values]).sum(0), adds_up=True),
    "min": Reduction(float("inf"), lambda values, _: torch.stack([*values]).amin(0), extreme=dist.ReduceOp.MIN),
    "max": Reduction(float("-inf"), lambda values, _: torch.stack([*values]).amax(0), extreme=dist.ReduceOp.MAX),
}
"""By Lightning's names: it takes these alone. What gathers by itself, a torchmetrics.Metric, is none of them."""


def reduction_of(reduce_fx: Any) -> Reduction:
    """The reduction that a user asks for by name or by function; a mean, unless Lightning knows it."""
    return REDUCTIONS.get(name_of_reduction(reduce_fx), REDUCTIONS["mean"])


def name_of_reduction(reduce_fx: Any) -> str:
    """The name of a reduction that is given by name or by function."""
    return reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "mean")
