"""Private names of torch about operators and divided tensors: what runs, and on which parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import DisableTorchFunction as DisableTorchFunction
from torch._guards import TracingContext as TracingContext
from torch._ops import OpOverload as OpOverload
from torch.distributed.tensor import DTensor
from torch.utils import checkpoint

from lightning_dist.compat.names import hands_on, name_of, uses
from lightning_dist.compat.torch import tree_leaves

D = TypeVar("D", bound=DTensor)

hands_on("torch._C.DisableTorchFunction", "runs functions of torch on subclasses of tensors as on plain ones")
hands_on("torch._ops.OpOverload", "tells operators from those that take functions")
hands_on("torch._guards.TracingContext", "tells whether torch.compile traces what runs")


@uses("torch.distributed.tensor.DTensor._local_tensor")
def set_local_tensor(tensor: DTensor, local: Tensor) -> None:
    """Gives a divided tensor another part of this rank, of the same shape."""
    tensor._local_tensor = local


DTENSOR_ATTRIBUTES = ("_local_tensor", "_spec")
"""What a DTensor keeps in its ``__dict__``, beside what users write there."""


@uses("torch.distributed.tensor.DTensor._spec")
def is_divided_alike(one: DTensor, other: DTensor) -> bool:
    """Whether ranks hold the same part of both."""
    mine, theirs = one._spec, other._spec
    if mine is theirs:
        return True
    same = mine.shape == theirs.shape and mine.placements == theirs.placements
    return same and (mine.mesh is theirs.mesh or mine.mesh == theirs.mesh)


@uses("torch.distributed.tensor.DTensor._spec")
def divided_tensor(kind: type[D], local: Tensor, like: DTensor) -> D:
    """A divided tensor of a class, divided as another, by the constructor that torch keeps for its own use.

    ``from_local`` takes ten times as long.
    """
    spec = like._spec
    if local.dtype != like.dtype:
        assert spec.tensor_meta is not None
        spec = replace(spec, tensor_meta=spec.tensor_meta._replace(dtype=local.dtype))
    return kind(local, spec, requires_grad=False)


LIKE = "_like"
"""How the names end of functions that make a tensor like another."""

FOREACH, FUSED = "_foreach_", "_fused_"
"""How the names begin of functions of several tensors, and of an optimizer's whole step."""

PRIVATE_QUESTIONS = {
    *("_has_compatible_shallow_copy_type", "_is_view", "_typed_storage"),
    "_amp_foreach_non_finite_check_and_unscale_",
}
"""Functions of torch that ask a tensor something, or work on its parts as they are."""

for _name in ("_foreach_norm", "_foreach_copy_", "_amp_foreach_non_finite_check_and_unscale_"):
    hands_on(f"torch.{_name}", "is given divided tensors by torch's own optimizers and clipping")
for _path in ("_has_compatible_shallow_copy_type", "Tensor._is_view", "Tensor._typed_storage"):
    hands_on(f"torch.{_path}", "asks a tensor something, also a divided one")


@uses("torch._foreach_norm")
def norm_of_each(tensors: list[Tensor], norm_type: float) -> tuple[Tensor, ...]:
    """The p-norms of tensors, in few kernels."""
    return tuple(torch._foreach_norm(tensors, norm_type))


@uses("torch._foreach_mul_")
def scale_each(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiplies tensors in place, in few kernels."""
    torch._foreach_mul_(tensors, factor)


@uses("torch._foreach_clamp_min_", "torch._foreach_clamp_max_")
def clamp_each(tensors: list[Tensor], least: float, most: float) -> None:
    """Clamps tensors in place, in few kernels."""
    torch._foreach_clamp_min_(tensors, least)
    torch._foreach_clamp_max_(tensors, most)


READS_A_NUMBER = name_of(
    "torch.ops.aten._local_scalar_dense", "the operator behind ``.item()``, ``bool()`` and the like"
)
INDEX_PUT = ("index_put_", "_index_put_impl_")
"""Operators of ``tensor[index] = value``."""

TRUNC_NORMAL = "_no_grad_trunc_normal_"
"""In ``torch.nn.init``, what draws until all values are in range."""

hands_on(f"torch.nn.init.{TRUNC_NORMAL}", "is recorded as one call, as what it draws depends on what it drew")


@uses("torch._ops.OpOverload._schema")
def arguments_of(operator: Any) -> list[Any]:
    """The arguments that an operator declares."""
    return list(operator._schema.arguments)


@uses("torch._ops.OpOverload._schema")
def name_of_operator(operator: Any) -> str:
    """The name that an operator declares, with its namespace: ``aten::add``."""
    return operator._schema.name


@uses("torch.UntypedStorage._cdata")
def address_of(storage: torch.UntypedStorage) -> int:
    """Which memory a storage is, also one without elements or on meta."""
    return storage._cdata


HOOKS_OF_OPTIMIZERS = "_optimizer_"
"""How the names begin of attributes in which an optimizer keeps its hooks."""

hands_on("torch.optim.Optimizer._optimizer_step_pre_hooks", "keeps hooks of an optimizer, which a copy leaves out")


# --- activation checkpointing ---

COSTLY_OPERATORS = frozenset(
    {
        *("mm", "addmm", "bmm", "baddbmm", "addbmm", "addmv", "mv", "_grouped_mm", "_scaled_mm", "_scaled_grouped_mm"),
        *("convolution", "_convolution", "convolution_overrideable"),
        *("cudnn_convolution", "miopen_convolution", "mkldnn_convolution"),
        *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
        *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
        *("_scaled_dot_product_fused_attention_overrideable", "_flash_attention_forward"),
        "_efficient_attention_forward",
    }
)
"""Operators of aten that cost more than what lies between them: matrix products, convolutions, attention."""


@uses("torch._ops.OpOverload._schema")
def is_collective(operator: Any) -> bool:
    """Whether an operator communicates, by torch's functional collectives."""
    return operator.namespace == "_c10d_functional"


@uses("torch._ops.OpOverload._schema")
def changes_arguments(operator: Any) -> bool:
    """Whether an operator changes one of its arguments."""
    return operator._schema.is_mutable


@uses("torch.utils.checkpoint._VersionWrapper", "torch.utils.checkpoint._RECOMPUTE")
def recompute_changed(mode: Any) -> None:
    """Has selective checkpointing compute again what it kept and what was changed in place since, where torch raises.

    Args:
        mode: that keeps: the first of the contexts of ``create_selective_checkpoint_contexts``.
    """
    for results in mode.storage.values():
        for index, result in results.items():
            if any(
                isinstance(kept, checkpoint._VersionWrapper)
                and isinstance(kept.val, Tensor)
                and kept.val._version != kept.version
                for kept in tree_leaves(result)
            ):
                results[index] = checkpoint._RECOMPUTE
