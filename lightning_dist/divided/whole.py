"""From a divided tensor to the whole and back, and numbers of the whole."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from lightning_dist.divided.readers import agree_to_read
from lightning_dist.dtensors import as_dtensor, data_groups, full, local_part, place_like


def whole(tensor: DTensor) -> Tensor:
    """The whole tensor, plain, on every rank; a gradient that comes back is averaged over the data ranks.

    Communication: that of :func:`~lightning_dist.dtensors.full`; backward, one all-reduce of the whole
    tensor's bytes per data axis of its mesh. The ranks of a tensor axis have the same gradient.

    Raises:
        RuntimeError: only one rank runs the code that asks for it.
    """
    agree_to_read(tensor)
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _Whole.apply(tensor)
    return full(tensor)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> Tensor:
        ctx.like = tensor.detach()
        return full(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return place_like(_mean_over_data(gradient, ctx.like), ctx.like)


class _Sum(torch.autograd.Function):
    """The sum of all elements, of which the parts are summed over the axes that divide."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> Tensor:
        ctx.like = tensor.detach()
        return reduce_parts(local_part(tensor).sum(), tensor, dist.ReduceOp.SUM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        value = _mean_over_data(gradient, ctx.like)
        local = local_part(ctx.like)
        return as_dtensor(value.to(local.dtype).expand(local.shape).contiguous(), ctx.like)


def _mean_over_data(gradient: Tensor, like: DTensor) -> Tensor:
    gradient = gradient.contiguous().clone()
    for group in data_groups(like):
        dist.all_reduce(gradient, group=group)
        gradient /= dist.get_world_size(group)
    return gradient


def reduce_parts(number: Tensor, like: DTensor, op: Any) -> Tensor:
    """What the ranks that hold different parts have, reduced in place. Communication: an all-reduce of it per axis."""
    agree_to_read(like)
    for axis, placement in enumerate(like.placements):
        if not placement.is_replicate() and like.device_mesh.size(axis) > 1:
            dist.all_reduce(number, op, like.device_mesh.get_group(axis))
    return number


def sum_of(tensor: DTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of all elements of the whole. Communication: one all-reduce of a number per axis that divides."""
    if torch.is_grad_enabled() and tensor.requires_grad and dtype is None:
        return _Sum.apply(tensor)
    return reduce_parts(local_part(tensor).sum(dtype=dtype), tensor, dist.ReduceOp.SUM)


def norms_of(tensors: list[Tensor], p: float) -> list[Tensor]:
    """The p-norm of each, of the whole where it is divided; p above 0, no gradient.

    Communication: one all-reduce of a float64 per tensor for each set of axes that divide, together.
    """
    locals_ = list(map(local_part, tensors))
    norms = [_norm(local, p) for local in locals_]
    divided: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            divided.setdefault((tensor.device_mesh, tensor.placements, tensor.device), []).append(index)
    for indices in divided.values():
        first: Any = tensors[indices[0]]
        together = torch.stack([norms[i] for i in indices])
        if math.isinf(p):
            together = reduce_parts(together, first, dist.ReduceOp.MAX)
        else:
            together = reduce_parts(together**p, first, dist.ReduceOp.SUM) ** (1 / p)
        for index, norm in zip(indices, together, strict=True):
            norms[index] = norm
    return [norm.to(_real(local.dtype)) for norm, local in zip(norms, locals_, strict=True)]


def _norm(local: Tensor, p: float) -> Tensor:
    """In float64; parts of 16 bits are summed in float32, or their rounding would show."""
    wide = torch.float32 if local.device.type == "mps" else torch.float64
    if not local.numel():
        return torch.zeros((), dtype=wide, device=local.device)
    local = local.abs() if local.is_complex() else local
    return torch.linalg.vector_norm(local, p, dtype=max(local.dtype, torch.float32, key=lambda d: d.itemsize)).to(wide)


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype
