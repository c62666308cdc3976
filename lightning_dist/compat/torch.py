"""Private names of torch beside those of fully_shard."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass as DisableTorchFunctionSubclass
from torch._C import _EnableTorchFunction as EnableTorchFunction  # noqa: F401
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import UnsupportedOperatorException as UnsupportedOperatorException
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import (
    compute_local_shape_and_global_offset as compute_local_shape_and_global_offset,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase  # noqa: F401
from torch.nn.modules.batchnorm import _NormBase as NormBase  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes  # noqa: F401
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


# --- pipeline ---

hands_on("torch._C.DisableTorchFunctionSubclass", "runs an operator on a subclass of tensors as on a plain one")
hands_on("torch._C._EnableTorchFunction", "lets subclasses of tensors see functions again inside of that")
hands_on("torch.nn.modules.batchnorm._BatchNorm", "tells BatchNorm of any number of dims")
hands_on("torch.nn.modules.batchnorm._NormBase", "tells BatchNorm and InstanceNorm of any number of dims")
hands_on("torch.utils._python_dispatch.TorchDispatchMode", "sees each operator that runs")
hands_on("torch.utils._python_dispatch._disable_current_modes", "runs a module beside what sees its operators")
hands_on("torch._subclasses.fake_tensor.FakeTensor", "stands for a tensor without memory")
for _name in ("DataDependentOutputException", "DynamicOutputShapeException", "UnsupportedOperatorException"):
    hands_on(
        f"torch._subclasses.fake_tensor.{_name}", "tells that an operator asks for values of a tensor without memory"
    )

COMPILED_CALL = "_compiled_call_impl"
"""The attribute of a module that torch calls in place of hooks and forward, where there is one; copies leave it out."""
hands_on(f"torch.nn.Module.{COMPILED_CALL}", "wraps the calls of a module, hooks included")


@uses("torch.nn.Module._call_impl")
def call_uncompiled(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a module's hooks and forward, also where it was compiled."""
    return module._call_impl(*args, **kwargs)


@uses("torch.nn.Module._call_impl", "torch.nn.Module._compiled_call_impl")
def call_of(module: nn.Module) -> Any:
    """What runs when a module is called: what it was compiled into, or its hooks and forward."""
    return vars(module).get(COMPILED_CALL) or module._call_impl


@uses("torch.nn.Module._parameters")
def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The dictionary in which a module keeps the parameters that are its own; an attribute may stand before one."""
    return module._parameters


@uses("torch.nn.Module._buffers")
def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The dictionary in which a module keeps the buffers that are its own."""
    return module._buffers


@uses("torch.nn.Module._modules")
def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """The dictionary in which a module keeps its children."""
    return module._modules


@uses("torch.nn.Module._parameters", "torch.nn.Module._buffers", "torch.nn.Module._modules")
def registries(parameters: dict[str, Any], buffers: dict[str, Any], modules: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module that keeps these as its own."""
    return {"_parameters": parameters, "_buffers": buffers, "_modules": modules}


@uses("torch.nn.Module._backward_hooks", "torch.nn.Module._backward_pre_hooks")
def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that run in backward passes."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


@uses("torch.Tensor._backward_hooks", "torch.Tensor._post_accumulate_grad_hooks")
def has_gradient_hooks(parameter: nn.Parameter) -> bool:
    """Whether a parameter has hooks on its gradient."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


@uses("torch.Tensor._version")
def version_of(tensor: Tensor) -> int:
    """How often a tensor was written in place; 0 for those of inference mode, which don't count."""
    return 0 if tensor.is_inference() else tensor._version


@uses("torch.UntypedStorage._cdata")
def memory_of(tensor: Tensor) -> int:
    """Which memory a tensor has, also one of no elements, or without any; views have that of their base."""
    return tensor.untyped_storage()._cdata


@uses("torch._ops.OpOverload._schema")
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


@uses("torch._ops.OpOverload._overloadpacket")
def all_overloads(operator: Any) -> Any:
    """The operator with all its overloads, under which torch lists what it costs."""
    return operator._overloadpacket
