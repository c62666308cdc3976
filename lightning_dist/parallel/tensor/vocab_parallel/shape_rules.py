"""Sharding rules of views, moves and slices: where the vocabulary's dim goes, and what they do to each rank's columns.

A rule returns the call on this rank's columns and the vocabulary's dim in its result; None where columns would meet.
It may raise what a wrong call raises.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dist.parallel.tensor.vocab_parallel.split_tensor import VocabTensor

Local = Callable[[Tensor], Any]
Rule = Callable[..., tuple[Local, int] | None]


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], Sequence) else sizes


def reshape_rule(logits: VocabTensor, *size: Any, shape: Any = None) -> tuple[Local, int] | None:
    """``reshape`` and ``view``, where they leave the vocabulary a dim of its own."""
    if size and isinstance(size[0], torch.dtype):
        return None
    sizes = list(_sizes(size) if shape is None else shape)
    if sizes.count(-1) == 1:
        known = math.prod(n for n in sizes if n != -1)
        if not known:
            return None
        sizes[sizes.index(-1)] = logits.numel() // known
    if math.prod(sizes) != logits.numel():
        return None
    before = math.prod(logits.shape[: logits.vocab_dim])
    for dim, n in enumerate(sizes):
        if n == logits.vocabulary.size and math.prod(sizes[:dim]) == before:
            own = [*sizes[:dim], logits.vocabulary.width, *sizes[dim + 1 :]]
            return functools.partial(_reshaped, own), dim
    return None


def _reshaped(sizes: list[int], columns: Tensor) -> Tensor:
    return columns.reshape(sizes)


def flatten_rule(logits: VocabTensor, start_dim: int = 0, end_dim: int = -1) -> tuple[Local, int] | None:
    """``flatten`` of other dims."""
    start, end = start_dim % logits.ndim, end_dim % logits.ndim
    if start > end or start <= logits.vocab_dim <= end:
        return None
    dim = logits.vocab_dim - (end - start if logits.vocab_dim > end else 0)
    return lambda columns: columns.flatten(start, end), dim


def unflatten_rule(logits: VocabTensor, dim: int, sizes: Sequence[int]) -> tuple[Local, int] | None:
    """``unflatten`` of another dim."""
    dim = dim % logits.ndim
    if dim == logits.vocab_dim:
        return None
    moved = logits.vocab_dim + (len(sizes) - 1 if logits.vocab_dim > dim else 0)
    return lambda columns: columns.unflatten(dim, sizes), moved


def permute_rule(logits: VocabTensor, *size: Any, dims: Any = None) -> tuple[Local, int]:
    """``permute``."""
    order = [dim % logits.ndim for dim in (_sizes(size) if dims is None else dims)]
    return lambda columns: columns.permute(order), order.index(logits.vocab_dim)


def transpose_rule(logits: VocabTensor, dim0: int, dim1: int) -> tuple[Local, int]:
    """``transpose``."""
    order = list(range(logits.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute_rule(logits, order)


def last_two_rule(logits: VocabTensor) -> tuple[Local, int]:
    """``mT`` and ``T``."""
    return transpose_rule(logits, -2, -1)


def movedim_rule(logits: VocabTensor, source: int, destination: int) -> tuple[Local, int]:
    """``movedim`` of one dim."""
    order = list(range(logits.ndim))
    order.insert(destination % logits.ndim, order.pop(source % logits.ndim))
    return permute_rule(logits, order)


def unsqueeze_rule(logits: VocabTensor, dim: int) -> tuple[Local, int]:
    """``unsqueeze``."""
    dim = dim % (logits.ndim + 1)
    return lambda columns: columns.unsqueeze(dim), logits.vocab_dim + (dim <= logits.vocab_dim)


def squeeze_rule(logits: VocabTensor, dim: int | None = None) -> tuple[Local, int] | None:
    """``squeeze`` of other dims."""
    dims = range(logits.ndim) if dim is None else [dim % logits.ndim]
    gone = [d for d in dims if logits.shape[d] == 1]
    if logits.vocab_dim in gone:
        return None
    return lambda columns: columns.squeeze(gone), logits.vocab_dim - sum(d < logits.vocab_dim for d in gone)


def expand_rule(logits: VocabTensor, *size: Any) -> tuple[Local, int] | None:
    """``expand`` of other dims."""
    sizes = list(_sizes(size))
    dim = logits.vocab_dim + len(sizes) - logits.ndim
    if sizes[dim] not in (-1, logits.vocabulary.size):
        return None
    sizes[dim] = -1
    return lambda columns: columns.expand(sizes), dim


def rule_of_first_dim(function: Callable[..., Any], removes: bool = False) -> Rule:
    """Functions along one other dim, given first, which goes if ``removes``."""

    def rule(logits: VocabTensor, dim: int, *args: Any, **kwargs: Any) -> tuple[Local, int] | None:
        dim = dim % logits.ndim
        if dim == logits.vocab_dim:
            return None
        moved = logits.vocab_dim - (removes and dim < logits.vocab_dim)
        return lambda columns: function(columns, dim, *args, **kwargs), moved

    return rule


def rule_of_last_dim(function: Callable[..., Any]) -> Rule:
    """Functions that cut one other dim into pieces."""

    def rule(logits: VocabTensor, pieces: Any, dim: int = 0) -> tuple[Local, int] | None:
        if dim % logits.ndim == logits.vocab_dim:
            return None
        return lambda columns: function(columns, pieces, dim), logits.vocab_dim

    return rule


def unbind_rule(logits: VocabTensor, dim: int = 0) -> tuple[Local, int] | None:
    """``unbind`` of another dim."""
    return rule_of_first_dim(torch.unbind, removes=True)(logits, dim)


def iterate_rule(logits: VocabTensor) -> tuple[Local, int] | None:
    """Iteration over the first dim."""
    rule = unbind_rule(logits)
    return rule and (lambda columns: iter(columns.unbind()), rule[1])


def getitem_rule(logits: VocabTensor, index: Any) -> tuple[Local, int] | None:
    """Indices that take all columns."""
    entries = list(index) if isinstance(index, tuple) else [index]
    taken = [_dims_taken(entry) for entry in entries]
    if None in taken:
        return None
    if not any(entry is Ellipsis for entry in entries):
        entries, taken = [*entries, Ellipsis], [*taken, 0]
    at = next(i for i, entry in enumerate(entries) if entry is Ellipsis)
    hole = logits.ndim - sum(n or 0 for n in taken)
    entries[at : at + 1], taken[at : at + 1] = [slice(None)] * hole, [1] * hole
    tensors = any(isinstance(entry, Tensor | list) for entry in entries)
    if tensors and logits.vocab_dim != logits.ndim - 1:
        return None
    dim = moved = 0
    for i, (entry, n) in enumerate(zip(entries, taken, strict=True)):
        if dim + (n or 0) > logits.vocab_dim:
            size = logits.vocabulary.size
            if not isinstance(entry, slice) or entry.indices(size) != (0, size, 1):
                return None
            entries[i] = slice(None)
            break
        dim, moved = dim + (n or 0), moved + (entry is None or isinstance(entry, slice))
    own = tuple(entries)
    # indices by tensors put their dims before the last one, wherever they are
    return lambda columns: columns[own], -1 if tensors else moved


def _dims_taken(entry: Any) -> int | None:
    """How many dims an index takes; None where that isn't known."""
    if entry is None or entry is Ellipsis:
        return 0
    if isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8):
        return entry.ndim or None
    if isinstance(entry, bool) or not isinstance(entry, int | slice | Tensor | list):
        return None
    return 1
