"""Private names of torch about operators and divided tensors: what runs, and on which parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import _foreach_mul_ as scale_each
from torch import _foreach_norm as norm_of_each
from torch._C import DisableTorchFunction
from torch._guards import TracingContext
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils import checkpoint
from torch.utils.hooks import RemovableHandle

from lightning_dist.compat.names import getter, hands_on, name_of, setter, uses
from lightning_dist.compat.torch import tree_leaves

D = TypeVar("D", bound=DTensor)

LIKE = "_like"
"""How the names end of functions that make a tensor like another."""
FOREACH, FUSED = "_foreach_", "_fused_"
"""How the names begin of functions of several tensors, and of an optimizer's whole step."""
HOOKS_OF_OPTIMIZERS = "_optimizer_"
"""How the names begin of attributes in which an optimizer keeps its hooks."""
INDEX_PUT = ("index_put_", "_index_put_impl_")
"""Operators of ``tensor[index] = value``."""
TRUNC_NORMAL = "_no_grad_trunc_normal_"
"""In ``torch.nn.init``, what draws until all values are in range."""
_UNSCALE = "_amp_foreach_non_finite_check_and_unscale_"
PRIVATE_QUESTIONS = {"_has_compatible_shallow_copy_type", "_is_view", "_typed_storage", _UNSCALE}
"""Functions of torch that ask a tensor something, or work on its parts as they are."""

hands_on(
    {
        "torch._C.DisableTorchFunction": "runs functions of torch on subclasses of tensors as on plain ones",
        "torch._guards.TracingContext": "tells whether torch.compile traces what runs",
        "torch._foreach_mul_": "multiplies tensors in place, in few kernels",
        "torch._foreach_norm": "the p-norms of tensors, in few kernels",
        "torch._ops.OpOverload": "tells operators from those that take functions",
        "torch.nn.init._no_grad_trunc_normal_": "is recorded as one call, as what it draws depends on what it drew",
        "torch.optim.Optimizer._optimizer_step_pre_hooks": "keeps hooks of an optimizer, which a copy leaves out",
    }
)
for _name in ("_foreach_copy_", _UNSCALE):
    hands_on({f"torch.{_name}": "is given divided tensors by torch's own optimizers and clipping"})
for _path in ("_has_compatible_shallow_copy_type", "Tensor._is_view", "Tensor._typed_storage"):
    hands_on({f"torch.{_path}": "asks a tensor something, also a divided one"})
READS_A_NUMBER = name_of("torch.ops.aten._local_scalar_dense", "the operator behind item(), bool() and the like")
address_of = getter("torch.UntypedStorage._cdata", "which memory a storage is, also one without elements or on meta")
all_overloads = getter("torch._ops.OpOverload._overloadpacket", "an operator's overloads; torch lists their cost by it")
set_local_tensor = setter("torch.distributed.tensor.DTensor._local_tensor", "gives a divided tensor another local part")

LOCAL_PART: Callable[[Any], Tensor] = attrgetter(
    name_of("torch.distributed.tensor.DTensor._local_tensor", "gives this rank's part of one after the other, fast")
)
_SPEC = name_of("torch.distributed.tensor.DTensor._spec", "gives how one after the other is divided, fast")
LAYOUT: Callable[[Any], tuple[Any, Any]] = attrgetter(f"{_SPEC}.placements", f"{_SPEC}.mesh")
INIT_GROUP = name_of("torch.optim.SGD._init_group", "collects the tensors of a step, in torch's own optimizers")

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


@uses("torch.optim.Optimizer._optimizer_step_post_hooks")
def register_first_step_post_hook(optimizer: Optimizer, hook: Callable[..., Any]) -> RemovableHandle:
    """Has a hook run after each step before those that are there."""
    handle = optimizer.register_step_post_hook(hook)
    hooks: Any = optimizer._optimizer_step_post_hooks
    hooks.move_to_end(handle.id, last=False)
    return handle


@uses("torch._foreach_clamp_min_", "torch._foreach_clamp_max_")
def clamp_each(tensors: list[Tensor], least: float, most: float) -> None:
    """Clamps tensors in place, in few kernels."""
    torch._foreach_clamp_min_(tensors, least)
    torch._foreach_clamp_max_(tensors, most)


@uses("torch._ops.OpOverload._schema")
def arguments_of(operator: Any) -> list[Any]:
    """The arguments that an operator declares."""
    return list(operator._schema.arguments)


@uses("torch._ops.OpOverload._schema")
def name_of_operator(operator: Any) -> str:
    """The name that an operator declares, with its namespace: ``aten::add``."""
    return operator._schema.name


def writes_in_place(operator: Any) -> bool:
    """Whether an operator changes one of its arguments."""
    return operator._schema.is_mutable


@uses("torch._ops.OpOverload._schema")
def written_arguments(operator: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments of an operator's call that it changes."""
    arguments = operator._schema.arguments
    given = {**dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}
    changed = (a for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return [given.get(argument.name) for argument in changed]


COSTLY_OPERATORS = {
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "addmv", "mv", "_grouped_mm", "_scaled_mm", "_scaled_grouped_mm"),
    *("convolution", "_convolution", "convolution_overrideable", "cudnn_convolution", "miopen_convolution"),
    *("mkldnn_convolution", "_flash_attention_forward", "_efficient_attention_forward"),
    *(f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")),
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable"),
}
"""Operators of aten that cost more than what lies between them: matrix products, convolutions, attention."""


def is_collective(operator: Any) -> bool:
    """Whether an operator communicates, by torch's functional collectives."""
    return operator.namespace == "_c10d_functional"


@uses("torch.utils.checkpoint._VersionWrapper", "torch.utils.checkpoint._RECOMPUTE")
def recompute_changed(mode: Any) -> None:
    """Has selective checkpointing compute again what it kept and what was changed in place since, where torch raises.

    ``mode`` keeps: the first of the contexts of ``create_selective_checkpoint_contexts``.
    """
    for results in mode.storage.values():
        for index, result in results.items():
            kept = [one for one in tree_leaves(result) if isinstance(one, checkpoint._VersionWrapper)]
            if any(isinstance(one.val, Tensor) and one.val._version != one.version for one in kept):
                results[index] = checkpoint._RECOMPUTE
