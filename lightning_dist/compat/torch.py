"""Private names of torch beside those of fully_shard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass as DisableTorchFunctionSubclass
from torch.distributed import _functional_collectives
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import (
    compute_local_shape_and_global_offset as compute_local_shape_and_global_offset,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import _reduction
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_structure as tree_structure
from torch.utils._pytree import tree_unflatten as tree_unflatten

from lightning_dist.compat.names import hands_on, uses

# --- ground floor ---

StridedShard = _StridedShard

for _name in ("tree_flatten", "tree_leaves", "tree_map", "tree_map_only", "tree_structure", "tree_unflatten"):
    hands_on(f"torch.utils._pytree.{_name}", "walks nested values as torch itself does; there is no public name")
hands_on(
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset",
    "tells which part of a DTensor a rank holds, as torch's distributed checkpoints ask it",
)
hands_on(
    "torch.distributed.tensor.placement_types._StridedShard",
    "the placement of a tensor that fully_shard divides where the tensor axis has divided it before",
)


@uses("torch.distributed.tensor.DTensor._local_tensor")
def local_tensor(tensor: DTensor) -> Tensor:
    """Gives this rank's part of a divided tensor, without autograd."""
    return tensor._local_tensor


# --- tensor ---

NormBase, DropoutNd = _NormBase, _DropoutNd
functional_collectives = _functional_collectives
disable_current_modes = _disable_current_modes

hands_on("torch._C.DisableTorchFunctionSubclass", "runs an operator on a subclass of tensors as on a plain one")
hands_on("torch.distributed._functional_collectives", "collectives that return tensors, which torch.compile traces")
hands_on("torch.nn.modules.batchnorm._NormBase", "tells BatchNorm and InstanceNorm of any number of dims")
hands_on("torch.nn.modules.dropout._DropoutNd", "tells dropout of any number of dims")
hands_on("torch.utils._python_dispatch._disable_current_modes", "runs a module beside what checkpointing records")

FORWARD_PRE_HOOKS, FORWARD_HOOKS = "_forward_pre_hooks", "_forward_hooks"
BACKWARD_PRE_HOOKS, BACKWARD_HOOKS = "_backward_pre_hooks", "_backward_hooks"
FORWARD_PRE_HOOKS_WITH_KWARGS = "_forward_pre_hooks_with_kwargs"
FORWARD_HOOKS_WITH_KWARGS = "_forward_hooks_with_kwargs"
for _name in (
    *(FORWARD_PRE_HOOKS, FORWARD_HOOKS, BACKWARD_PRE_HOOKS, BACKWARD_HOOKS),
    *(FORWARD_PRE_HOOKS_WITH_KWARGS, FORWARD_HOOKS_WITH_KWARGS),
):
    hands_on(f"torch.nn.Module.{_name}", "where a module keeps its hooks, by their ids; torch lists them nowhere")

MODULE_REGISTRIES = ("_parameters", "_buffers", "_modules")
"""The attributes in which a module keeps its parameters, buffers and children."""
for _name in MODULE_REGISTRIES:
    hands_on(f"torch.nn.Module.{_name}", "where a module keeps them, beside its plain attributes")


@uses("torch.nn.Module._parameters")
def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The dictionary in which a module keeps the parameters that are its own; an attribute may stand before one."""
    return module._parameters


@uses("torch.Tensor._version")
def version_of(tensor: Tensor) -> int:
    """How often a tensor was written in place; 0 for those of inference mode, which don't count."""
    return 0 if tensor.is_inference() else tensor._version


@uses("torch.Tensor._make_wrapper_subclass")
def wrapper_tensor(kind: type[Any], size: list[int], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of a class of ours that has a shape and no memory."""
    return Tensor._make_wrapper_subclass(kind, size, dtype=dtype, device=device)


@uses("torch._C.TensorBase", "torch._C.TensorBase._grad", "torch._C.TensorBase._cdata")
def tensor_attributes() -> set[str]:
    """Names of the attributes that are built into tensors, but for those that give the gradient or the memory."""
    built_in = type(torch._C.TensorBase.grad)
    found = {name for name, value in vars(torch._C.TensorBase).items() if isinstance(value, built_in)}
    return found - {"grad", "_grad", "_cdata"}


@uses("torch._C._will_engine_execute_node")
def returns_gradient(leaf: Any) -> bool:
    """Whether the backward pass that runs returns a parameter's gradient, as ``torch.autograd.grad`` asks it to.

    What torch asks itself about a leaf is an error exactly then.
    """
    try:
        torch._C._will_engine_execute_node(leaf)
    except RuntimeError:
        return True
    return False


@uses("torch._assert_async")
def assert_async(condition: Tensor, message: str) -> None:
    """Stops the device if the tensor there is not true, without waiting for it."""
    torch._assert_async(condition, message)


@uses("torch._ops.OpOverload._schema")
def writes_in_place(operator: Any) -> bool:
    """Whether an operator changes one of its arguments."""
    return operator._schema.is_mutable


@uses("torch.nn._reduction.legacy_get_string")
def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """The ``reduction`` that the loss functions' old arguments stand for."""
    return _reduction.legacy_get_string(size_average, reduce)


@uses("torch.nn.TransformerEncoderLayer._ff_block", "torch.nn.TransformerDecoderLayer._ff_block")
def is_plain_feed_forward(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> bool:
    """Whether a transformer layer of torch runs its two dense layers as torch wrote it, not as a subclass did."""
    plain = (nn.TransformerEncoderLayer._ff_block, nn.TransformerDecoderLayer._ff_block)
    return type(layer)._ff_block in plain
