"""Sharding rules: the functions of torch that leave a vocabulary's columns apart, and what each does to a rank's own.

See :mod:`~lightning_dist.parallel.tensor.vocab_parallel.shape_rules` for what a rule is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dist.parallel.tensor.vocab_parallel.shape_rules import (
    Local,
    Rule,
    expand_rule,
    flatten_rule,
    getitem_rule,
    iterate_rule,
    last_two_rule,
    movedim_rule,
    permute_rule,
    reshape_rule,
    rule_of_first_dim,
    rule_of_last_dim,
    squeeze_rule,
    transpose_rule,
    unbind_rule,
    unflatten_rule,
    unsqueeze_rule,
)
from lightning_dist.parallel.tensor.vocab_parallel.split_tensor import VocabTensor


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
        Tensor.expand: expand_rule,
        Tensor.__getitem__: getitem_rule,
        Tensor.__iter__: iterate_rule,
        Tensor.T.__get__: last_two_rule,  # type: ignore[attr-defined]
        Tensor.mT.__get__: last_two_rule,  # type: ignore[attr-defined]
        Tensor.cuda: _cast(Tensor.cuda),
    }
    moves: dict[Rule, tuple[str, ...]] = {
        reshape_rule: ("view", "reshape"),
        flatten_rule: ("flatten",),
        unflatten_rule: ("unflatten",),
        permute_rule: ("permute",),
        transpose_rule: ("transpose", "swapaxes", "swapdims"),
        movedim_rule: ("movedim", "moveaxis"),
        unsqueeze_rule: ("unsqueeze",),
        squeeze_rule: ("squeeze",),
        unbind_rule: ("unbind",),
    }
    for rule, names in moves.items():
        rules |= dict.fromkeys(torch_functions(*names), rule)
    rules |= {function: rule_of_first_dim(function) for function in torch_functions("narrow", "index_select")}
    rules |= {function: rule_of_first_dim(function, removes=True) for function in torch_functions("select")}
    rules |= {function: rule_of_last_dim(function) for function in torch_functions("split", "chunk", "tensor_split")}
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
