"""From the plain model's tensors to what a rank holds of them, and back."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

# Private in torch 2.14: the local shape and the offset of a DTensor, which DCP uses for the same purpose.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from typing_extensions import TypeIs

from lightning_dist.checkpoint.tree import map_leaves


def full(tensor: Tensor) -> Tensor:
    """The plain model's tensor, on every rank that holds a part of it.

    A plain tensor is returned as it is. A ``DTensor`` costs one all-gather per axis that shards it, of the
    tensor's bytes, packed or on the tensor axis beside another one all-reduce; every rank of its mesh calls this.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    if on_tensor_axis(tensor) and (tensor.device_mesh.ndim > 1 or type(tensor.placements[0]) is _StridedShard):
        return _summed(tensor)
    whole = DTensor.full_tensor(tensor)  # not that of a subclass, which calls this
    # The gathered tensor may be a view of a padded buffer, and saving a view saves the whole buffer.
    return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()


def place_like(tensor: Tensor, like: Tensor, device: torch.device | str | None = None) -> Tensor:
    """``tensor``, a plain tensor of the plain model, laid out as ``like``: this rank's part of it on its
    device, or on another.

    The dtype stays. Nothing is communicated: every rank has ``tensor``, or maps it from the same file.
    A tensor that is a ``DTensor`` already, or of another shape than ``like``, is returned as it is.
    """
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    if on_tensor_axis(like):
        held = tensor.detach()
        for dim, index in enumerate(held_indices(like)):
            held = held if len(index) == held.shape[dim] else held.index_select(dim, index.to(held.device))
        part = held.to(device or like.to_local().device, copy=True, memory_format=torch.contiguous_format)
        return _as_dtensor(part, like, tensor.shape)
    sizes, offsets = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    local = tensor
    for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        local = local.narrow(dim, min(offset, local.shape[dim]), size)
    # A copy: the part must outlive the file, and must not keep the whole tensor alive.
    local = local.detach().to(like.to_local().device, copy=True, memory_format=torch.contiguous_format)
    return _as_dtensor(local, like, tensor.shape)


def empty_like_layout(size: torch.Size, dtype: torch.dtype, like: Tensor | None) -> Tensor:
    """Memory for a tensor of ``size``, or for this rank's part if ``like`` is a DTensor of that size."""
    if not isinstance(like, DTensor) or like.shape != size:
        return torch.empty(size, dtype=dtype)
    local = torch.empty_like(like.to_local(), dtype=dtype, memory_format=torch.contiguous_format)
    return _as_dtensor(local, like, size)


def replicate_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of the plain ``tensor`` on the device of ``like``, replicated over its mesh if it has one."""
    if not isinstance(like, DTensor):
        return tensor.detach().to(like.device, copy=True)
    local = tensor.detach().to(like.to_local().device, copy=True)
    mesh = like.device_mesh
    return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)


class HostMemory:
    """Host memory for copies of a state, kept from one to the next: to get it from the system takes several times as
    long as to copy into it.

    Where tensors come from an accelerator it is page-locked, and the copies run together.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype, bool], list[Tensor]] = {}
        self._lent: list[tuple[tuple[torch.Size, torch.dtype, bool], Tensor]] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy, complete after :meth:`settle` and whole until :meth:`reuse`."""
        tensor = tensor.detach()
        if tensor.layout != torch.strided or tensor.is_quantized:
            return tensor.to("cpu", copy=True)
        locked = tensor.device.type != "cpu" and torch.accelerator.is_available()
        kind = tensor.shape, tensor.dtype, locked
        free = self._free.get(kind)
        memory = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=locked)
        self._lent.append((kind, memory))
        # an alias: what is written on the copy, as an attribute, is not there the next time
        return memory.copy_(tensor, non_blocking=locked).view_as(memory)

    def snapshot(self, tree: Any) -> Any:
        """A deep copy, its tensors in host memory: nothing that the training or its callbacks change is shared."""
        copies: dict[int, Any] = {}

        def note(_: Any, value: Any) -> Any:
            if isinstance(value, Tensor) and id(value) not in copies:
                copies[id(value)] = self.copy(value)
            return value

        map_leaves(tree, note)
        return copy.deepcopy(tree, copies)

    def settle(self) -> None:
        """Waits for the copies from an accelerator."""
        if any(locked for (_, _, locked), _ in self._lent):
            torch.accelerator.synchronize()

    def reuse(self) -> None:
        """Takes back all that was lent, to be overwritten; what was not lent this time is let go."""
        self._free = {}
        for kind, memory in self._lent:
            self._free.setdefault(kind, []).append(memory)
        self._lent = []


def is_split(tensor: Tensor) -> bool:
    """Whether ranks hold different parts of the tensor."""
    return isinstance(tensor, DTensor) and any(
        not placement.is_replicate() and tensor.device_mesh.size(axis) > 1
        for axis, placement in enumerate(tensor.placements)
    )


def on_tensor_axis(tensor: Any) -> TypeIs[DTensor]:
    """Whether the tensor axis divides it.

    [Note: placements on the tensor axis]
    That axis divides first, perhaps each of the pieces that a matrix packs; fully_shard then divides what is left into
    consecutive rows. torch writes the second down as if it knew the first to be unpacked: its ``full_tensor`` and its
    offsets are wrong for packed ones, without a word (seen in 2.14). So the rows and columns that a rank holds are
    listed here, in the order in which they were divided.
    """
    return isinstance(tensor, DTensor) and "tp" in (tensor.device_mesh.mesh_dim_names or ())


def held_indices(tensor: DTensor) -> list[Tensor]:
    """Of each dim of the plain tensor, the indices that this rank holds. See [Note: placements on the tensor axis]."""
    return held_indices_of(tensor.shape, tensor.device_mesh, tensor.placements)


def held_indices_of(shape: Iterable[int], mesh: DeviceMesh, placements: Iterable[Placement]) -> list[Tensor]:
    """As :func:`held_indices`, of a tensor of this shape that is divided so."""
    indices = [torch.arange(size) for size in shape]
    axes = list(zip(mesh.mesh_dim_names or (), placements, mesh.shape, mesh.get_coordinate() or (), strict=True))
    for name, placement, size, rank in sorted(axes, key=lambda axis: axis[0] != "tp"):
        if not isinstance(placement, (Shard, _StridedShard)):
            continue
        pieces = getattr(placement, "split_factor", 1) if name == "tp" else 1
        parts = [piece.chunk(size) for piece in indices[placement.dim].chunk(pieces)]
        mine = [part[rank] if rank < len(part) else part[0][:0] for part in parts]
        indices[placement.dim] = torch.cat(mine)
    return indices


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor; a plain tensor as it is."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def boxes(tensor: DTensor, copy: Tensor | None = None) -> Tensor:
    """What this rank holds, or a copy of it, told where in the plain tensor its boxes lie: DCP's
    ``CheckpointableTensor`` protocol.
    """
    local = local_part(tensor) if copy is None else copy
    told: Any = local.view_as(local)  # an object of its own, which takes the attributes
    runs = list(itertools.product(*(_runs_held(tensor))))
    told.global_shape = tuple(tensor.shape)
    told.local_offsets = [tuple(start for start, _, _ in box) for box in runs]
    told.global_offsets = [tuple(start for _, start, _ in box) for box in runs]
    told.local_sizes = [tuple(length for *_, length in box) for box in runs]
    return told


def _runs_held(tensor: DTensor) -> list[list[tuple[int, int, int]]]:
    """Of each dim of the plain tensor, the runs that this rank holds."""
    if on_tensor_axis(tensor):
        return [_runs(index) for index in held_indices(tensor)]
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return [[(0, offset, size)] if size else [] for size, offset in zip(sizes, offsets, strict=True)]


def _runs(index: Tensor) -> list[tuple[int, int, int]]:
    """Consecutive indices: where they start here, where in the plain tensor, how many."""
    if not len(index):
        return []
    breaks = ((index[1:] - index[:-1]) != 1).nonzero().flatten().add(1).tolist()
    starts, ends = [0, *breaks], [*breaks, len(index)]
    return [(start, int(index[start]), end - start) for start, end in zip(starts, ends, strict=True)]


def _summed(tensor: DTensor) -> Tensor:
    """The plain tensor: every rank puts what it holds in its place among zeros, and the axes that divide sum up."""
    whole = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.to_local().device)
    grid = torch.meshgrid(*(index.to(whole.device) for index in held_indices(tensor)), indexing="ij")
    whole[grid] = tensor.to_local()
    for axis, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            dist.all_reduce(whole, group=tensor.device_mesh.get_group(axis))
    return whole


def _as_dtensor(local: Tensor, like: DTensor, shape: torch.Size) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
