"""From the plain model's tensors to what a rank holds of them, and back: local parts and whole tensors of DTensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from typing_extensions import TypeIs

from lightning_dist.collectives import BUCKET_BYTES
from lightning_dist.compat.distributed import (
    StridedShard,
    compute_local_shape_and_global_offset,
    dtensor_where_it_is,
    local_tensor,
)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor, or a plain tensor; its memory, without autograd. Communication: none."""
    return local_tensor(tensor).detach() if isinstance(tensor, DTensor) else tensor.detach()


def part_of(tensor: Tensor, like: DTensor) -> Tensor:
    """This rank's part, plain, of a whole tensor that every rank has. Communication: none."""
    return local_part(place_like(tensor.detach(), like))


def as_dtensor(local: Tensor, like: DTensor) -> DTensor:
    """A tensor of which this rank holds ``local``, divided as ``like``."""
    return _from_local(local, like, like.stride())


def _contiguous_dtensor(local: Tensor, like: DTensor) -> DTensor:
    return _from_local(local, like, torch.empty(like.shape, device="meta").stride())


def _from_local(local: Tensor, like: DTensor, stride: tuple[int, ...]) -> DTensor:
    return divided_from(local, like, like.shape, stride)


def divided_from(local: Tensor, like: DTensor, shape: torch.Size, stride: tuple[int, ...]) -> DTensor:
    """A tensor of a shape, divided as ``like``, of which this rank holds ``local``; on the device of the mesh, or where
    ``local`` is if ``like`` is elsewhere too: ``cpu_offload`` keeps parts on the host.
    """
    mesh, placements = like.device_mesh, like.placements
    elsewhere = mesh.device_type not in (local.device.type, local_tensor(like).device.type)
    if elsewhere and not local.is_meta:
        return dtensor_where_it_is(local, mesh, placements, shape, stride)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def place_like(tensor: Tensor, like: Tensor, device: torch.device | str | None = None) -> Tensor:
    """``tensor``, of the plain model, laid out as ``like``: this rank's part of it on its device, or on another.

    The dtype stays. Nothing is communicated: every rank has ``tensor``, or maps it from the same file.
    A tensor that is a ``DTensor`` already, or of another shape than ``like``, is returned as it is.
    """
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    part = tensor.detach()
    if on_tensor_axis(like):
        for dim, index in enumerate(held_indices(like)):
            part = part if len(index) == part.shape[dim] else part.index_select(dim, index.to(part.device))
    else:
        sizes, offsets = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
        for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
            part = part.narrow(dim, min(offset, part.shape[dim]), size)
    # A copy: the part must outlive the file, and must not keep the whole tensor alive.
    part = part.to(device or local_tensor(like).device, copy=True, memory_format=torch.contiguous_format)
    return _contiguous_dtensor(part, like)


def empty_like_layout(size: torch.Size, dtype: torch.dtype, like: Tensor | None) -> Tensor:
    """Memory for a tensor of ``size``, or for this rank's part if ``like`` is a DTensor of that size."""
    if not isinstance(like, DTensor) or like.shape != size:
        return torch.empty(size, dtype=dtype)
    local = torch.empty_like(local_part(like), dtype=dtype, memory_format=torch.contiguous_format)
    return _contiguous_dtensor(local, like)


def replicate_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of the plain ``tensor`` on the device of ``like``, replicated over its mesh if it has one."""
    local = tensor.detach().to(local_part(like).device, copy=True)
    if not isinstance(like, DTensor):
        return local
    mesh = like.device_mesh
    replicated = [Replicate()] * mesh.ndim
    if local.device.type != mesh.device_type:
        return dtensor_where_it_is(local, mesh, replicated, local.shape, local.stride())
    return DTensor.from_local(local, mesh, replicated, run_check=False)


def full(tensor: Tensor) -> Tensor:
    """The plain model's tensor, on every rank that holds a part of it; a plain one as it is.

    A ``DTensor`` costs one all-gather per axis that shards it, of the tensor's bytes, packed or on the tensor axis
    beside another one all-reduce; every rank of its mesh calls this.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    if on_tensor_axis(tensor) and (tensor.device_mesh.ndim > 1 or type(tensor.placements[0]) is StridedShard):
        return _summed(tensor)
    whole = DTensor.full_tensor(tensor)  # not that of a subclass, which calls this
    # The gathered tensor may be a view of a padded buffer, and saving a view saves the whole buffer.
    return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()


def full_on_host(tensor: Tensor, keep: bool) -> Tensor:
    """As :func:`full`, in host memory, on the ranks that ``keep`` it; an empty tensor on the others.

    What is larger than ``BUCKET_BYTES`` comes a few rows at a time, so that no device holds all of it: an all-reduce
    for each axis that divides it, of its bytes together.
    """
    if not isinstance(tensor, DTensor) or tensor.nbytes <= BUCKET_BYTES or not tensor.ndim:
        whole = full(tensor)
        return whole.cpu() if keep else torch.empty(0)
    whole = torch.empty(tensor.shape if keep else 0, dtype=tensor.dtype)
    step = max(1, BUCKET_BYTES * len(tensor) // tensor.nbytes)
    for begin in range(0, len(tensor), step):
        rows = _summed(tensor, begin, min(begin + step, len(tensor)))
        if keep:
            whole[begin : begin + step].copy_(rows)
    return whole


def _summed(tensor: DTensor, begin: int = 0, end: int | None = None) -> Tensor:
    """The plain tensor, or some of its rows: every rank puts what it holds in its place among zeros, and the axes that
    divide sum up, as whole numbers: values, the negative zero among them, arrive bit for bit.
    """
    local, runs = local_part(tensor), held_runs(tensor)
    shape = tensor.shape
    if end is not None:
        shape, runs[0] = torch.Size([end - begin, *shape[1:]]), list(_clipped(runs[0], begin, end))
    whole = torch.zeros(shape, dtype=tensor.dtype, device=local.device)
    for run in itertools.product(*runs):
        target = tuple(slice(place, place + length) for _, place, length in run)
        whole[target] = local[tuple(slice(start, start + length) for start, _, length in run)]
    numbers = whole.flatten().view(torch.uint8)
    numbers = numbers if len(numbers) % 4 else numbers.view(torch.int32)
    for axis, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            dist.all_reduce(numbers, group=tensor.device_mesh.get_group(axis))
    return whole


def _clipped(runs: Iterable[tuple[int, int, int]], begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """What of runs lies in some rows, whose first is then the row 0."""
    for start, place, length in runs:
        first, last = max(place, begin), min(place + length, end)
        if first < last:
            yield start + first - place, first - begin, last - first


def is_split(tensor: Tensor) -> bool:
    """Whether ranks hold different parts of the tensor."""
    return isinstance(tensor, DTensor) and any(
        not placement.is_replicate() and tensor.device_mesh.size(axis) > 1
        for axis, placement in enumerate(tensor.placements)
    )


def num_pieces(tensor: Tensor) -> int:
    """How many different pieces of this tensor the ranks of its mesh hold; 1 for a plain one."""
    if not isinstance(tensor, DTensor):
        return 1
    axes = list(zip(tensor.device_mesh.shape, tensor.placements, strict=True))
    assert not any(placement.is_partial() for _, placement in axes), "gradients are reduced before their norm is taken"
    return math.prod(size for size, placement in axes if not placement.is_replicate())


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
    """The indices that this rank holds of each dim of the plain tensor. See [Note: placements on the tensor axis]."""
    return held_indices_of(tensor.shape, tensor.device_mesh, tensor.placements)


def held_indices_of(shape: Iterable[int], mesh: DeviceMesh, placements: Iterable[Placement]) -> list[Tensor]:
    """As :func:`held_indices`, of a tensor of this shape that is divided so."""
    indices = [torch.arange(size) for size in shape]
    axes = list(zip(mesh.mesh_dim_names or (), placements, mesh.shape, mesh.get_coordinate() or (), strict=True))
    for name, placement, size, rank in sorted(axes, key=lambda axis: axis[0] != "tp"):
        if not isinstance(placement, (Shard, StridedShard)):
            continue
        pieces = getattr(placement, "split_factor", 1) if name == "tp" else 1
        parts = [piece.chunk(size) for piece in indices[placement.dim].chunk(pieces)]
        mine = [part[rank] if rank < len(part) else part[0][:0] for part in parts]
        indices[placement.dim] = torch.cat(mine)
    return indices


def held_runs(tensor: DTensor) -> list[list[tuple[int, int, int]]]:
    """The runs of indices that this rank holds of each dim of the plain tensor.

    Returns:
        For each run where it starts in this rank's part, where in the plain tensor, and its length.
    """
    if on_tensor_axis(tensor):
        return [_runs(index) for index in held_indices(tensor)]
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return [[(0, offset, size)] if size else [] for size, offset in zip(sizes, offsets, strict=True)]


def _runs(index: Tensor) -> list[tuple[int, int, int]]:
    if not len(index):
        return []
    breaks = ((index[1:] - index[:-1]) != 1).nonzero().flatten().add(1).tolist()
    starts, ends = [0, *breaks], [*breaks, len(index)]
    return [(start, int(index[start]), end - start) for start, end in zip(starts, ends, strict=True)]


def data_groups(tensor: DTensor) -> Iterator[dist.ProcessGroup]:
    """Along the axes of its mesh on which ranks see different samples."""
    mesh = tensor.device_mesh
    for axis, name in enumerate(mesh.mesh_dim_names or ()):
        if name != "tp" and mesh.size(axis) > 1:
            yield mesh.get_group(axis)


def from_first_data_rank(tensor: Tensor, like: DTensor) -> Tensor:
    """Gives every data rank the first one's values, in place. Communication: a broadcast per data axis."""
    for group in reversed(list(data_groups(like))):
        dist.broadcast(tensor, dist.get_global_rank(group, 0), group)
    return tensor
