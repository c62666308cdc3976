"""From the plain model's tensors to what a rank holds of them, and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

# Private in torch 2.14: the local shape and the offset of a DTensor, which DCP uses for the same purpose.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def full(tensor: Tensor) -> Tensor:
    """The plain model's tensor, on every rank that holds a part of it.

    A plain tensor is returned as it is. A ``DTensor`` costs one all-gather per axis that shards it, of the
    tensor's bytes; every rank of its mesh calls this.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()
    # The gathered tensor may be a view of a padded buffer, and saving a view saves the whole buffer.
    return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()


def place_like(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, a plain tensor of the plain model, laid out as ``like``: this rank's part of it on its
    device.

    The dtype stays. Nothing is communicated: every rank has ``tensor``, or maps it from the same file.
    A tensor that is a ``DTensor`` already, or of another shape than ``like``, is returned as it is.
    """
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
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


def is_split(tensor: Tensor) -> bool:
    """Whether ranks hold different parts of the tensor."""
    return isinstance(tensor, DTensor) and any(
        not placement.is_replicate() and tensor.device_mesh.size(axis) > 1
        for axis, placement in enumerate(tensor.placements)
    )


def _as_dtensor(local: Tensor, like: DTensor, shape: torch.Size) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
