"""Private names of torch beside those of operators and of torch.distributed: modules and their hooks, tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import _assert_async as assert_async
from torch._C import DisableTorchFunctionSubclass
from torch._C import _EnableTorchFunction as EnableTorchFunction
from torch._dynamo.eval_frame import OptimizedModule
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.amp import GradScaler
from torch.autograd import _profiler_enabled as is_profiled
from torch.autograd import _unsafe_preserve_version_counter as preserve_versions
from torch.nn._reduction import legacy_get_string as legacy_reduction
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.dropout import _DropoutNd as DropoutNd
from torch.nn.modules.module import _IncompatibleKeys as IncompatibleKeys
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_structure, tree_unflatten
from torch.utils.data._utils import worker

from lightning_dist.compat.names import getter, hands_on, method, setter, uses

hands_on(
    {
        "torch._assert_async": "stops the device if the tensor there is not true, without waiting for it",
        "torch._C.DisableTorchFunctionSubclass": "runs an operator on a subclass of tensors as on a plain one",
        "torch._C._EnableTorchFunction": "lets subclasses of tensors see functions again inside of that",
        "torch._dynamo.eval_frame.OptimizedModule": "the class of what torch.compile makes of a module",
        "torch._subclasses.fake_tensor.FakeTensor": "stands for a tensor without memory",
        "torch._subclasses.fake_tensor.FakeTensorMode": "makes tensors with a shape and a place in a file, unread",
        "torch.autograd._profiler_enabled": "whether torch.profiler runs in this process, of which there can be one",
        "torch.autograd._unsafe_preserve_version_counter": "lets writes to tensors meanwhile not count as writes",
        "torch.nn._reduction.legacy_get_string": "gives the reduction that a loss's old arguments stand for",
        "torch.nn.modules.batchnorm._BatchNorm": "tells BatchNorm of any number of dims",
        "torch.nn.modules.batchnorm._NormBase": "tells BatchNorm and InstanceNorm of any number of dims",
        "torch.nn.modules.dropout._DropoutNd": "tells dropout of any number of dims",
        "torch.nn.modules.module._IncompatibleKeys": "what load_state_dict returns",
        "torch.utils._python_dispatch.TorchDispatchMode": "sees each operator that runs",
        "torch.utils._python_dispatch._disable_current_modes": "runs a module beside what sees its operators",
    }
)
for _name in ("DataDependentOutputException", "DynamicOutputShapeException", "UnsupportedOperatorException"):
    hands_on({f"torch._subclasses.fake_tensor.{_name}": "tells that an operator asks for values that have no memory"})
for _name in ("tree_flatten", "tree_leaves", "tree_map", "tree_map_only", "tree_structure", "tree_unflatten"):
    hands_on({f"torch.utils._pytree.{_name}": "walks nested values as torch itself does; there is no public name"})


FORWARD_PRE_HOOKS, FORWARD_PRE_HOOKS_WITH_KWARGS = "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"
FORWARD_HOOKS, FORWARD_HOOKS_WITH_KWARGS = "_forward_hooks", "_forward_hooks_with_kwargs"
BACKWARD_PRE_HOOKS, BACKWARD_HOOKS = "_backward_pre_hooks", "_backward_hooks"
_STATE_HOOKS = ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
HOOKS_OF_MODULES = (FORWARD_PRE_HOOKS, FORWARD_HOOKS, *_STATE_HOOKS)
"""The attributes in which a module keeps the hooks of its forward and of its state dict."""
MODULE_REGISTRIES = ("_parameters", "_buffers", "_modules")
"""The attributes in which a module keeps its parameters, buffers and children."""
COMPILED_CALL = "_compiled_call_impl"
"""The attribute of a module that torch calls in place of hooks and forward, where there is one; copies leave it out."""

_KWARGS_HOOKS = (FORWARD_PRE_HOOKS_WITH_KWARGS, FORWARD_HOOKS_WITH_KWARGS)
for _name in (*HOOKS_OF_MODULES, *_KWARGS_HOOKS, BACKWARD_PRE_HOOKS, BACKWARD_HOOKS):
    hands_on({f"torch.nn.Module.{_name}": "where a module keeps its hooks, by their ids; torch lists them nowhere"})
for _name in MODULE_REGISTRIES:
    hands_on({f"torch.nn.Module.{_name}": "where a module keeps them, beside its plain attributes"})

children_of = getter("torch.nn.Module._modules", "a module's children by name, which may be any string")
compiled_call = getter("torch.nn.Module._compiled_call_impl", "what module.compile() made of a module's call; or None")
versions_of = getter("torch.nn.Module._metadata", "the versions of a module's parts, by name, in its state dict", None)
call_uncompiled = method("torch.nn.Module._call_impl", "calls a module's hooks and forward, also where compiled")
set_versions = setter("torch.nn.Module._metadata", "gives a state dict the versions of the parts of its module")


def registries(*of_each: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module that keeps these parameters, buffers and modules as its own."""
    return dict(zip(MODULE_REGISTRIES, of_each, strict=True))


@uses("torch.nn.Module._parameters")
def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own, by name; an attribute may stand before one. ``torch.compile`` traces it."""
    return module._parameters


@uses("torch.nn.Module._buffers")
def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers that are a module's own, by name."""
    return module._buffers


@uses("torch.nn.Module._call_impl")
def call_of(module: nn.Module) -> Any:
    """What runs when a module is called: what it was compiled into, or its hooks and forward."""
    return vars(module).get(COMPILED_CALL) or module._call_impl


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that run in backward passes."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


@uses("torch.nn.TransformerEncoderLayer._ff_block", "torch.nn.TransformerDecoderLayer._ff_block")
def is_plain_feed_forward(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> bool:
    """Whether a transformer layer of torch runs its two dense layers as torch wrote it, not as a subclass did."""
    plain = (nn.TransformerEncoderLayer._ff_block, nn.TransformerDecoderLayer._ff_block)
    return type(layer)._ff_block in plain


@uses("torch.Tensor._post_accumulate_grad_hooks")
def hooks_after_accumulation(parameter: nn.Parameter) -> Iterable[Any]:
    """The hooks of ``register_post_accumulate_grad_hook``."""
    return (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()


@uses("torch.Tensor._backward_hooks")
def has_gradient_hooks(parameter: nn.Parameter) -> bool:
    """Whether a parameter has hooks on its gradient."""
    return bool(parameter._backward_hooks or hooks_after_accumulation(parameter))


@uses("torch._C._current_graph_task_id")
def is_in_backward() -> bool:
    """Whether a backward pass runs in this thread."""
    return torch._C._current_graph_task_id() != -1


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


@uses("torch.Tensor._version")
def version_of(tensor: Tensor) -> int:
    """How often a tensor was written in place; 0 for those of inference mode, which don't count."""
    return 0 if tensor.is_inference() else tensor._version


@uses("torch.UntypedStorage._cdata")
def memory_of(tensor: Tensor) -> int:
    """Which memory a tensor has, also one of no elements, or without any; views have that of their base."""
    return tensor.untyped_storage()._cdata


@uses("torch._C.TensorBase", "torch._C.TensorBase._grad", "torch._C.TensorBase._cdata")
def tensor_attributes() -> set[str]:
    """Names of the attributes that are built into tensors, but for those that give the gradient or the memory."""
    built_in = type(torch._C.TensorBase.grad)
    found = {name for name, value in vars(torch._C.TensorBase).items() if isinstance(value, built_in)}
    return found - {"grad", "_grad", "_cdata"}


@uses("torch.Tensor._make_wrapper_subclass")
def wrapper_tensor(kind: type[Any], size: list[int], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of a class of ours that has a shape and no memory."""
    return Tensor._make_wrapper_subclass(kind, size, dtype=dtype, device=device)


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


CLASSES_OF_A_DCP_INDEX = {
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}
for _module, _name in CLASSES_OF_A_DCP_INDEX:
    hands_on({f"{_module}.{_name}": "is pickled in the index of torch.distributed.checkpoint"})


@uses("torch.UntypedStorage._checkpoint_offset")
def place_in_file(fake: Tensor) -> int | None:
    """Where in a file the storage of a tensor begins that was loaded under a ``FakeTensorMode``."""
    # documented with skip_data, for all its underscore
    return getattr(fake.untyped_storage(), "_checkpoint_offset", None)


def forget_iterator(loader: Any) -> None:
    """Lets a copy of a ``DataLoader`` begin without the iterator, and the workers, of the one that it was copied of."""
    object.__setattr__(loader, "_iterator", None)


@uses("torch.utils.data._utils.worker._worker_info", "torch.utils.data._utils.worker.WorkerInfo")
@contextmanager
def as_first_worker(loader: Any) -> Iterator[None]:
    """While it lasts, ``get_worker_info`` says that this is the first of a ``DataLoader``'s workers, if it has any."""
    before = worker._worker_info
    if getattr(loader, "num_workers", 0):
        worker._worker_info = worker.WorkerInfo(id=0, num_workers=loader.num_workers, seed=0, dataset=loader.dataset)
    try:
        yield
    finally:
        worker._worker_info = before


class StandsForLoader:
    """Shows Lightning the iterator of the ``DataLoader`` in whose place it is iterated, by which it ends the workers.

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


@uses("torch.amp.GradScaler._get_scale_async")
def scale_on_device(scaler: GradScaler) -> Tensor | float:
    """What a scaler multiplies losses with, without waiting for it; a number before the first time."""
    scale = scaler._get_scale_async()
    return scaler.get_scale() if scale is None else scale


@uses("torch.amp.GradScaler._unscale_grads_", "torch._amp_foreach_non_finite_check_and_unscale_")
class UnscalingGradScaler(GradScaler):
    """A gradient scaler that says itself how gradients are unscaled: torch's own works on plain tensors only."""

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        verdict = self.unscale_gradients(optimizer, inv_scale, found_inf, allow_fp16)
        return {verdict.device: verdict}

    def unscale_gradients(self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Tensor:
        """Multiplies the gradients of an optimizer that is about to step by ``inv_scale``, in place.

        Returns:
            One element, as ``found_inf``, which is 0: above 0 where a gradient was not finite.
        """
        raise NotImplementedError

    unscale_tensors = staticmethod(torch._amp_foreach_non_finite_check_and_unscale_)
    """Unscales plain tensors of one device and dtype, and notes in ``found_inf`` whether they were finite."""
