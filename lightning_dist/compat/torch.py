"""Private names of torch beside those of fully_shard."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from io import IOBase
from typing import IO, Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass as DisableTorchFunctionSubclass
from torch._C import _EnableTorchFunction as EnableTorchFunction
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import UnsupportedOperatorException as UnsupportedOperatorException
from torch.amp import GradScaler
from torch.distributed.checkpoint.utils import _create_file_view
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, _redistribute
from torch.distributed.tensor._utils import (
    compute_local_shape_and_global_offset as compute_local_shape_and_global_offset,
)
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import _reduction
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.dropout import _DropoutNd as DropoutNd
from torch.nn.modules.module import _IncompatibleKeys as IncompatibleKeys
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_structure as tree_structure
from torch.utils._pytree import tree_unflatten as tree_unflatten

from lightning_dist.compat.names import hands_on, name_of, uses

# --- ground floor ---


for _name in ("tree_flatten", "tree_leaves", "tree_map", "tree_map_only", "tree_structure", "tree_unflatten"):
    hands_on(f"torch.utils._pytree.{_name}", "walks nested values as torch itself does; there is no public name")


@uses("torch.Tensor._post_accumulate_grad_hooks")
def hooks_after_accumulation(parameter: nn.Parameter) -> Iterable[Any]:
    """The hooks of ``register_post_accumulate_grad_hook``."""
    return (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()


def forget_iterator(loader: Any) -> None:
    """Lets a copy of a ``DataLoader`` begin without the iterator, and the workers, of the one that it was copied of."""
    object.__setattr__(loader, "_iterator", None)


@uses("torch.nn.Module._modules")
def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's children by name, which may be any string here."""
    return module._modules


# --- checkpoint ---

hands_on("torch._subclasses.fake_tensor.FakeTensorMode", "makes tensors with a shape and a place in a file, unread")


hands_on("torch.nn.modules.module._IncompatibleKeys", "what load_state_dict returns")


hands_on("torch.utils._python_dispatch.TorchDispatchMode", "sees each operator that runs")


CLASSES_OF_A_DCP_INDEX = {
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}


for _module, _name in CLASSES_OF_A_DCP_INDEX:
    hands_on(f"{_module}.{_name}", "is pickled in the index of torch.distributed.checkpoint")


@uses("torch.UntypedStorage._checkpoint_offset")
def place_in_file(fake: Tensor) -> int | None:
    """Where in a file the storage of a tensor begins that was loaded under a ``FakeTensorMode``."""
    # documented with skip_data, for all its underscore
    offset: int | None = getattr(fake.untyped_storage(), "_checkpoint_offset", None)
    return offset


@uses("torch.Tensor._make_wrapper_subclass")
def wrapper_tensor(kind: type[Any], size: list[int], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of a class of ours that has a shape and no memory."""
    return Tensor._make_wrapper_subclass(kind, size, dtype=dtype, device=device)


@uses("torch.nn.Module._metadata")
def versions_of(state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """The versions of the parts of a module that a state dict is of, by their names; None if it has none."""
    return getattr(state_dict, "_metadata", None)


@uses("torch.nn.Module._metadata")
def set_versions(state_dict: Any, versions: dict[str, Any]) -> None:
    """Gives a state dict the versions of the parts of its module."""
    state_dict._metadata = versions


hands_on("torch._C.DisableTorchFunctionSubclass", "runs an operator on a subclass of tensors as on a plain one")


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


class StandsForLoader:
    """Shows Lightning the iterator of a ``DataLoader`` in whose place it is iterated, by which it ends the workers.

    Args:
        loader: the user's.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    @property
    @uses("torch.utils.data.DataLoader._iterator")
    def _iterator(self) -> Any:
        """Shows Lightning the iterator of the loader itself."""
        return getattr(self.loader, "_iterator", None)

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        if hasattr(self.loader, "_iterator"):
            self.loader._iterator = value


hands_on("torch._C._EnableTorchFunction", "lets subclasses of tensors see functions again inside of that")


hands_on("torch.nn.modules.batchnorm._BatchNorm", "tells BatchNorm of any number of dims")


hands_on("torch.utils._python_dispatch._disable_current_modes", "runs a module beside what sees its operators")


hands_on("torch._subclasses.fake_tensor.FakeTensor", "stands for a tensor without memory")


for _name in ("DataDependentOutputException", "DynamicOutputShapeException", "UnsupportedOperatorException"):
    hands_on(
        f"torch._subclasses.fake_tensor.{_name}", "tells that an operator asks for values of a tensor without memory"
    )


@uses("torch._subclasses.fake_tensor")
@contextmanager
def without_fake_tensor_errors() -> Iterator[None]:
    """While it lasts, torch logs no errors of operators on tensors without memory, which are tried again for real."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


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


@uses("torch.nn.Module._buffers")
def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The dictionary in which a module keeps the buffers that are its own."""
    return module._buffers


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


@uses("torch.UntypedStorage._cdata")
def memory_of(tensor: Tensor) -> int:
    """Which memory a tensor has, also one of no elements, or without any; views have that of their base."""
    return tensor.untyped_storage()._cdata


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


@uses("torch.amp.GradScaler._unscale_grads_", "torch._amp_foreach_non_finite_check_and_unscale_")
class UnscalingGradScaler(GradScaler):
    """A gradient scaler that says itself how gradients are unscaled: torch's own works on plain tensors only."""

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        verdict = self.unscale_gradients(optimizer, inv_scale, found_inf, allow_fp16)
        return {verdict.device: verdict}

    def unscale_gradients(self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Tensor:
        """Unscales the gradients of an optimizer's parameters, in place.

        Args:
            optimizer: about to step.
            inv_scale: one element, what gradients are multiplied by.
            found_inf: one element, 0.
            allow_fp16: whether gradients may be of 16 bits.

        Returns:
            One element, above 0 where a gradient was not finite.
        """
        raise NotImplementedError

    @staticmethod
    def unscale_tensors(tensors: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
        """Unscales plain tensors of one device and dtype, and notes in ``found_inf`` whether they were finite."""
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, found_inf, inv_scale)
