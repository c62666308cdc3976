"""Layers that can be divided, and what they call their sizes."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_dist.compat.torch import own_parameters
from lightning_dist.plans.blocks import is_of
from lightning_dist.plans.tensor.plan import Split, join_names

_LINEAR = ("FalconLinear",)
"""Classes of transformers that compute what ``nn.Linear`` does, in words of their own."""


def is_dense(module: object) -> bool:
    """Whether it is a matrix that its input is multiplied by: ``nn.Linear``, or transformers' ``Conv1D``.

    A layer with a forward of its own, or whose weight is computed (parametrised, pruned), is not.
    """
    if isinstance(module, nn.Linear):
        is_plain = type(module).forward is nn.Linear.forward or is_of(module, "transformers", _LINEAR)
        return is_plain and "weight" in own_parameters(module)
    return _is_transposed(module)


def _is_transposed(module: object) -> bool:
    # transformers need not be there; its Conv1D keeps (inputs, outputs)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def outputs(layer: Any) -> int:
    """Number of output features."""
    return layer.nf if _is_transposed(layer) else layer.out_features


def inputs(layer: Any) -> int:
    """Number of input features."""
    return layer.weight.shape[0] if _is_transposed(layer) else layer.in_features


def column(name: str, layer: Any, packed: int = 1) -> dict[str, Split]:
    """The parameters of a layer whose outputs are divided, by dotted name."""
    bias = {} if layer.bias is None else {join_names(name, "bias"): Split(0, packed)}
    return {join_names(name, "weight"): Split(1 if _is_transposed(layer) else 0, packed), **bias}


def column_attributes(name: str, layer: Any) -> tuple[str, ...]:
    """The integers that a divided layer's forward reads."""
    return (join_names(name, "nf"),) if _is_transposed(layer) else ()


def row(layer: Any) -> Split:
    """The weight of a layer whose inputs are divided."""
    return Split(0 if _is_transposed(layer) else 1)


_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_HEAD_WIDTHS = ("head_dim", "head_width", "attention_head_size", "key_value_proj_dim", "head_size", "dim_head")
_SIZES = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "attn_dim", "all_head_size", "inner_dim", "split_size")


def count_heads(attention: nn.Module) -> int | None:
    """Number of query heads of an attention module, from its own attributes or its config; None if it does not tell."""
    return _first_integer(_HEADS, attention, getattr(attention, "config", None))


def counts_heads_itself(attention: nn.Module) -> bool:
    """Whether the number of its query heads is an attribute of its own."""
    return any(type(vars(attention).get(name)) is int for name in _HEADS)


def head_width(attention: nn.Module) -> int | None:
    """Features of a head; None if it does not tell."""
    return _first_integer(_HEAD_WIDTHS, attention)


def _first_integer(names: tuple[str, ...], *owners: Any) -> int | None:
    found = (getattr(owner, name, None) for owner in owners for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def head_attributes(attention: nn.Module) -> tuple[str, ...]:
    """The integers of an attention module that count its heads, or features of all heads together."""
    return tuple(name for name in (*_HEADS, *_SIZES) if type(vars(attention).get(name)) is int)
