"""Private names of torch.distributed beside those of fully_shard."""

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
from torch._dynamo.eval_frame import OptimizedModule as OptimizedModule
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

StridedShard = _StridedShard


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


@uses("torch.distributed.checkpoint.utils._create_file_view")
def part_of_file(file: IO[bytes], offset: int, length: int) -> Any:
    """A part of a file as a file, as torch's own reader of distributed checkpoints makes it."""
    return _create_file_view(cast(IOBase, file), offset, length)


hands_on("torch.distributed._functional_collectives", "collectives that return tensors, which torch.compile traces")


@uses(
    "torch.distributed.tensor._redistribute._gen_transform_infos",
    "torch.distributed.tensor.debug._clear_sharding_prop_cache",
)
def forget_earlier_meshes() -> None:
    """Empties the caches in which DTensor keeps what it inferred of equal meshes.

    A mesh equals an earlier one of the same ranks, also where that one's process groups are gone, since its process
    group was destroyed; results would then name groups that can't be found.
    """
    _clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()


@uses("torch.distributed.device_mesh.DeviceMesh._flatten")
def flattened_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """Joins the axes of a mesh into one. Communication: makes its process groups."""
    return mesh._flatten(name)
