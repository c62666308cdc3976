"""Private names of torch beside those of fully_shard."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass as DisableTorchFunctionSubclass
from torch._C import _EnableTorchFunction as EnableTorchFunction  # noqa: F401
from torch._dynamo.eval_frame import OptimizedModule as OptimizedModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import (
    compute_local_shape_and_global_offset as compute_local_shape_and_global_offset,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_structure as tree_structure
from torch.utils._pytree import tree_unflatten as tree_unflatten

from lightning_dist.compat.names import hands_on, uses

# --- ground floor ---

StridedShard = _StridedShard
NormBase = _NormBase

for _name in ("tree_flatten", "tree_leaves", "tree_map", "tree_map_only", "tree_structure", "tree_unflatten"):
    hands_on(f"torch.utils._pytree.{_name}", "walks nested values as torch itself does; there is no public name")
hands_on(
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset",
    "tells which part of a DTensor a rank holds, as torch's distributed checkpoints ask it",
)
hands_on("torch._C.DisableTorchFunctionSubclass", "runs an operator on a subclass of tensors as on a plain one")
hands_on("torch._C._EnableTorchFunction", "lets subclasses of tensors see functions again inside of that")
hands_on("torch._dynamo.eval_frame.OptimizedModule", "the class of what torch.compile makes of a module")
hands_on("torch.nn.modules.batchnorm._NormBase", "the class of norms that keep running statistics")
hands_on(
    "torch.distributed.tensor.placement_types._StridedShard",
    "the placement of a tensor that fully_shard divides where the tensor axis has divided it before",
)


@uses("torch.distributed.tensor.DTensor._local_tensor")
def local_tensor(tensor: DTensor) -> Tensor:
    """Gives this rank's part of a divided tensor, without autograd."""
    return tensor._local_tensor


@uses("torch.Tensor._version")
def version_of(tensor: Tensor) -> int:
    """Counts the writes to a tensor; 0 for one of inference mode, which has no count."""
    return 0 if tensor.is_inference() else tensor._version


@uses("torch.autograd._unsafe_preserve_version_counter")
def preserve_versions(tensors: tuple[Tensor, ...]) -> AbstractContextManager[None]:
    """Lets writes to the tensors meanwhile not count as writes."""
    return torch.autograd._unsafe_preserve_version_counter(tensors)


@uses("torch.nn.Module._parameters")
def own_parameters(module: nn.Module) -> dict[str, Any]:
    """The parameters of a module itself by name, also None and those that it has under several names; to write to."""
    return module._parameters


@uses("torch.nn.Module._buffers")
def own_buffers(module: nn.Module) -> dict[str, Any]:
    """The buffers of a module itself by name, also None; to write to."""
    return module._buffers


MODULE_REGISTRIES = ("_parameters", "_buffers", "_modules")
"""Attributes under which a module keeps what is registered with it."""

HOOKS_OF_MODULES = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
for _name in (*MODULE_REGISTRIES, *HOOKS_OF_MODULES):
    hands_on(f"torch.nn.Module.{_name}", "what is registered with a module, of which a copy leaves some out")


COMPILED_CALL = "_compiled_call_impl"
"""Attribute of a module that ``module.compile()`` sets."""


@uses("torch.nn.Module._compiled_call_impl")
def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """What ``module.compile()`` made of a module's call; None where it is not compiled."""
    return module._compiled_call_impl
