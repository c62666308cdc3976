"""Sharding rules: the functions of torch that leave a vocabulary's columns apart, and what each does to a rank's own.

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


def _reshape_rule(logits: VocabTensor, *size: Any, shape: Any = None) -> tuple[Local, int] | None:
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
            sizes[dim] = logits.vocabulary.width
            return lambda columns: columns.reshape(sizes), dim
    return None


def _flatten_rule(logits: VocabTensor, start_dim: int = 0, end_dim: int = -1) -> tuple[Local, int] | None:
    start, end = start_dim % logits.ndim, end_dim % logits.ndim
    if start > end or start <= logits.vocab_dim <= end:
        return None
    dim = logits.vocab_dim - (end - start if logits.vocab_dim > end else 0)
    return lambda columns: columns.flatten(start, end), dim


def _unflatten_rule(logits: VocabTensor, dim: int, sizes: Sequence[int]) -> tuple[Local, int] | None:
    dim = dim % logits.ndim
    if dim == logits.vocab_dim:
        return None
    moved = logits.vocab_dim + (len(sizes) - 1 if logits.vocab_dim > dim else 0)
    return lambda columns: columns.unflatten(dim, sizes), moved


def _permute_rule(logits: VocabTensor, *size: Any, dims: Any = None) -> tuple[Local, int]:
    order = [dim % logits.ndim for dim in (_sizes(size) if dims is None else dims)]
    return lambda columns: columns.permute(order), order.index(logits.vocab_dim)


def _transpose_rule(logits: VocabTensor, dim0: int, dim1: int) -> tuple[Local, int]:
    order = list(range(logits.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute_rule(logits, order)


def _movedim_rule(logits: VocabTensor, source: int, destination: int) -> tuple[Local, int]:
    order = list(range(logits.ndim))
    order.insert(destination % logits.ndim, order.pop(source % logits.ndim))
    return _permute_rule(logits, order)


def _unsqueeze_rule(logits: VocabTensor, dim: int) -> tuple[Local, int]:
    dim = dim % (logits.ndim + 1)
    return lambda columns: columns.unsqueeze(dim), logits.vocab_dim + (dim <= logits.vocab_dim)


def _squeeze_rule(logits: VocabTensor, dim: int | None = None) -> tuple[Local, int] | None:
    dims = range(logits.ndim) if dim is None else [dim % logits.ndim]
    gone = [d for d in dims if logits.shape[d] == 1]
    if logits.vocab_dim in gone:
        return None
    return lambda columns: columns.squeeze(gone), logits.vocab_dim - sum(d < logits.vocab_dim for d in gone)


def _expand_rule(logits: VocabTensor, *size: Any) -> tuple[Local, int] | None:
    sizes = list(_sizes(size))
    dim = logits.vocab_dim + len(sizes) - logits.ndim
    if sizes[dim] not in (-1, logits.vocabulary.size):
        return None
    sizes[dim] = -1
    return lambda columns: columns.expand(sizes), dim


def _rule_of_first_dim(function: Callable[..., Any], removes: bool = False) -> Rule:
    """Functions along one other dim, given first, which goes if ``removes``."""

    def rule(logits: VocabTensor, dim: int, *args: Any, **kwargs: Any) -> tuple[Local, int] | None:
        dim = dim % logits.ndim
        if dim == logits.vocab_dim:
            return None
        moved = logits.vocab_dim - (removes and dim < logits.vocab_dim)
        return lambda columns: function(columns, dim, *args, **kwargs), moved

    return rule


def _rule_of_last_dim(function: Callable[..., Any]) -> Rule:
    """Functions that cut one other dim into pieces."""

    def rule(logits: VocabTensor, pieces: Any, dim: int = 0) -> tuple[Local, int] | None:
        if dim % logits.ndim == logits.vocab_dim:
            return None
        return lambda columns: function(columns, pieces, dim), logits.vocab_dim

    return rule


def _unbind_rule(logits: VocabTensor, dim: int = 0) -> tuple[Local, int] | None:
    return _rule_of_first_dim(torch.unbind, removes=True)(logits, dim)


def _iterate_rule(logits: VocabTensor) -> tuple[Local, int] | None:
    rule = _unbind_rule(logits)
    return rule and (lambda columns: iter(columns.unbind()), rule[1])


def _getitem_rule(logits: VocabTensor, index: Any) -> tuple[Local, int] | None:
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


def _cast(function: Callable[..., Any]) -> Rule:
    """Changes of dtype; a move to another device gathers."""

    def rule(logits: VocabTensor, *args: Any, **kwargs: Any) -> tuple[Local, int] | None:
        columns = logits.to_local()
        args = tuple(value.to_local() if isinstance(value, VocabTensor) else value for value in args)
        if function(columns.new_empty(0), *args, **kwargs).device != columns.device:
            return None
        return lambda columns: function(columns, *args, **kwargs), logits.vocab_dim

    return rule


def _pointwise(function: Callable[..., Any], in_place: bool = False) -> Rule:
    """Functions of each number by itself: whole operands are cut to this rank's columns.

    A whole operand that wants a gradient makes it gather: from this rank's columns it would get a part of it.
    """

    def rule(logits: VocabTensor, *args: Any, **kwargs: Any) -> tuple[Local, int] | None:
        operands = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        from_end = logits.ndim - logits.vocab_dim
        size = logits.vocabulary.size
        if kwargs.get("out") is not None or (in_place and args[0] is not logits):
            return None
        if function in torch_functions("where") and len(args) + len(kwargs) < 3:
            return None

        def cut(value: Any) -> Any:
            if isinstance(value, VocabTensor):
                return value.to_local()
            if isinstance(value, Tensor) and value.ndim >= from_end and value.shape[-from_end] == size > 1:
                return logits.vocabulary.own(value, -from_end)
            return value

        for value in operands:
            if isinstance(value, VocabTensor):
                if value.vocabulary != logits.vocabulary or value.ndim - value.vocab_dim != from_end:
                    return None
            elif (value.requires_grad and torch.is_grad_enabled()) or (
                value.ndim >= from_end and value.shape[-from_end] not in (1, size)
            ):
                return None
        dim = max(value.ndim for value in operands) - from_end
        return lambda columns: function(*map(cut, args), **{name: cut(value) for name, value in kwargs.items()}), dim

    return rule


def _join(function: Callable[..., Any], adds: bool = False) -> Rule:
    """Logits beside each other in another dim, which is new if ``adds``."""

    def rule(logits: VocabTensor, tensors: Sequence[Tensor], dim: int = 0) -> tuple[Local, int] | None:
        for other in tensors:
            if not isinstance(other, VocabTensor) or other.vocabulary != logits.vocabulary:
                return None
            if other.vocab_dim != logits.vocab_dim or other.ndim != logits.ndim:
                return None
        dim = dim % (logits.ndim + adds)
        if dim == logits.vocab_dim and not adds:
            return None
        moved = logits.vocab_dim + (adds and dim <= logits.vocab_dim)
        return lambda columns: function([other.to_local() for other in tensors], dim), moved  # type: ignore[attr-defined]

    return rule


def torch_functions(*names: str) -> list[Any]:
    """torch's function and the tensor's method of these names."""
    return [getattr(owner, name) for name in names for owner in (torch, Tensor) if callable(getattr(owner, name, None))]


def _first_argument() -> dict[Any, Rule]:
    rules: dict[Any, Rule] = {
        Tensor.expand: _expand_rule,
        Tensor.__getitem__: _getitem_rule,
        Tensor.__iter__: _iterate_rule,
        Tensor.T.__get__: functools.partial(_transpose_rule, dim0=-2, dim1=-1),  # type: ignore[attr-defined]
        Tensor.mT.__get__: functools.partial(_transpose_rule, dim0=-2, dim1=-1),  # type: ignore[attr-defined]
        Tensor.cuda: _cast(Tensor.cuda),
    }
    moves: dict[Rule, tuple[str, ...]] = {
        _reshape_rule: ("view", "reshape"),
        _flatten_rule: ("flatten",),
        _unflatten_rule: ("unflatten",),
        _permute_rule: ("permute",),
        _transpose_rule: ("transpose", "swapaxes", "swapdims"),
        _movedim_rule: ("movedim", "moveaxis"),
        _unsqueeze_rule: ("unsqueeze",),
        _squeeze_rule: ("squeeze",),
        _unbind_rule: ("unbind",),
    }
    for rule, names in moves.items():
        rules |= dict.fromkeys(torch_functions(*names), rule)
    rules |= {function: _rule_of_first_dim(function) for function in torch_functions("narrow", "index_select")}
    rules |= {function: _rule_of_first_dim(function, removes=True) for function in torch_functions("select")}
    rules |= {function: _rule_of_last_dim(function) for function in torch_functions("split", "chunk", "tensor_split")}
    casts = ("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu")
    return rules | {getattr(Tensor, name): _cast(getattr(Tensor, name)) for name in casts}


def _any_argument() -> dict[Any, Rule]:
    alone = """
        contiguous clone detach neg negative mul multiply div divide true_divide add sub subtract rsub tanh clamp clip
        clamp_min clamp_max masked_fill where nan_to_num
        __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __div__ __neg__
    """
    rules: dict[Any, Rule] = {function: _pointwise(function) for function in torch_functions(*alone.split())}
    rules |= {function: _pointwise(function, in_place=True) for function in IN_PLACE}
    rules[Tensor.data.__get__] = _pointwise(Tensor.detach)  # type: ignore[attr-defined]
    return rules | {torch.cat: _join(torch.cat), torch.stack: _join(torch.stack, adds=True)}


_WRITING = """
    mul_ multiply_ div_ divide_ add_ sub_ clamp_ masked_fill_ __iadd__ __isub__ __imul__ __itruediv__ __idiv__
"""
IN_PLACE = frozenset(torch_functions(*_WRITING.split()))
BY_FIRST_ARGUMENT = _first_argument()
"""Rules that take the logits and the function's further arguments."""

BY_ANY_ARGUMENT = _any_argument()
"""Rules that take the logits, and all arguments of the function, among which they are."""
