"""How far a tensor is from that of one process, and what beside others is rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_dist.doctor.parity import TINY

SMALL = 1e-6
"""Beside the largest of its kind, what is so small is rounding of others."""

HUGE = 1e6
"""Entries from here on, and those that are not finite, are no measure of the others: masks are made of such."""


def distance(mine: Tensor, whole: Tensor, floor: float) -> float:
    """The norm of the difference, relative to that of the whole, or to ``floor`` where that is larger. Entries of
    the whole that are :data:`HUGE` are each compared by themselves; those that are not finite have to be the same.
    """
    if mine.shape != whole.shape:
        return math.inf
    if not whole.is_floating_point():
        return 0.0 if torch.equal(mine, whole) else math.inf
    mine, whole = mine.double(), whole.double()
    finite = whole.isfinite()
    same = finite & mine.isfinite() | (mine == whole) | mine.isnan() & whole.isnan()
    if not bool(same.all()):
        return math.inf
    ordinary = whole.abs() < HUGE
    huge = finite & ~ordinary
    apart = float((mine[huge] / whole[huge] - 1).abs().max()) if bool(huge.any()) else 0.0
    away = float((mine - whole).where(ordinary, 0.0).norm())
    return max(apart, away / max(_norm(whole), floor, TINY)) if away else apart


def largest_norm(tensors: Iterable[Tensor]) -> float:
    """The largest, over entries that are not :data:`HUGE`."""
    return max((_norm(tensor.double()) for tensor in tensors if tensor.is_floating_point()), default=0.0)


def _norm(tensor: Tensor) -> float:
    return float(tensor.where(tensor.abs() < HUGE, 0.0).norm())
