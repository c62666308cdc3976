"""Private names of torch beside those of fully_shard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from io import IOBase
from typing import IO, Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass as DisableTorchFunctionSubclass
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.distributed.checkpoint.utils import _create_file_view
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import (
    compute_local_shape_and_global_offset as compute_local_shape_and_global_offset,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import _reduction
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import _IncompatibleKeys as IncompatibleKeys
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_structure as tree_structure
from torch.utils._pytree import tree_unflatten as tree_unflatten

from lightning_dist.compat.names import hands_on, name_of, uses

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


# --- logs, data, elastic ---


RANK_NOT_IN_GROUP = name_of(
    "torch.distributed.distributed_c10d._rank_not_in_group", "The function that every collective asks about its group."
)


@uses("torch.distributed.distributed_c10d._get_default_store")
def default_store() -> Any:
    """The store of the process group of the world, over which its ranks have met."""
    return dist.distributed_c10d._get_default_store()


@uses("torch.distributed.distributed_c10d.ProcessGroup._get_sequence_number_for_group")
def num_collectives(group: dist.ProcessGroup) -> int:
    """How many collectives this rank has begun in a group."""
    return group._get_sequence_number_for_group()  # type: ignore[attr-defined]


@uses("torch.Tensor._backward_hooks", "torch.Tensor._post_accumulate_grad_hooks")
def has_gradient_hooks(tensor: Tensor) -> bool:
    """Whether hooks run when a tensor's gradient is there."""
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


@uses("torch.Tensor._post_accumulate_grad_hooks")
def hooks_after_accumulation(parameter: nn.Parameter) -> Iterable[Any]:
    """The hooks of ``register_post_accumulate_grad_hook``."""
    return (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()


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


@uses("torch.distributed.checkpoint.utils._create_file_view")
def part_of_file(file: IO[bytes], offset: int, length: int) -> Any:
    """A part of a file as a file, as torch's own reader of distributed checkpoints makes it."""
    return _create_file_view(cast(IOBase, file), offset, length)


@uses("torch.UntypedStorage._checkpoint_offset")
def place_in_file(fake: Tensor) -> int | None:
    """Where in a file the storage of a tensor begins that was loaded under a ``FakeTensorMode``."""
    # documented with skip_data, for all its underscore
    offset: int | None = getattr(fake.untyped_storage(), "_checkpoint_offset", None)
    return offset


@uses("torch.UntypedStorage._cdata")
def storage_id(tensor: Tensor) -> int:
    """Tells whether two tensors share their memory, also where they have none (on meta)."""
    return tensor.untyped_storage()._cdata


@uses("torch._ops.OpOverload._schema")
def written_arguments(operator: Any, args: tuple[Any, ...]) -> list[Any]:
    """The arguments by position that an operator writes to."""
    schema = operator._schema
    if not schema.is_mutable:
        return []
    return [value for argument, value in zip(schema.arguments, args, strict=False) if argument.is_write]


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


# --- tensor ---

NormBase, DropoutNd = _NormBase, _DropoutNd


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
