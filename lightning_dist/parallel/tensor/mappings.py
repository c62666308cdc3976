"""The differentiable collectives at the border of a tensor-parallel region, and how gradients of parts add up.

``copy_to_tensor_region`` and ``reduce_from_tensor_region`` are each other's transpose (Megatron-LM's f and g,
https://arxiv.org/abs/1909.08053), as are ``gather_from_sequence_region`` and ``reduce_scatter_to_sequence_region``,
their sequence-parallel forms (https://arxiv.org/abs/2205.05198), and ``gather`` and ``scatter``. So the backward of
each is the other one, differentiable again to any order: a gradient penalty costs the collectives of the backward once
more.

[Note: gradients of a part]
The weight of a norm of heads is used by each rank on its heads, so that the sum of the ranks' gradients is the
gradient; but a penalty in the loss uses the same weight alike on every rank, and its gradient is the whole already. To
tell them apart, a region sees such a weight through a view that multiplies its gradient by the number of ranks. At the
end the mean over the ranks is the sum of the parts and one of the wholes, in one all-reduce for all such weights (see
:class:`~lightning_dist.parallel.tensor.split.TensorAxis`); and what was summed already keeps its value under a mean.

[Note: positions that are divided]
Positions are divided along a dim of size L into ceil(L / ranks) for each rank. What is missing at the end is filled
with the last position again, so that whatever works position by position stays as finite there as anywhere; it is cut
off wherever the positions come together, and gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightning_dist.compat.distributed import functional_collectives as functional
from lightning_dist.compat.torch import returns_gradient


def copy_to_tensor_region(activation: Tensor, mesh: DeviceMesh) -> Tensor:
    """A replicated activation, about to be used by each rank's part. Communication: backward one all-reduce."""
    return _Copy.apply(activation, mesh)


def reduce_from_tensor_region(partial: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of each rank's part of an activation, replicated. Communication: forward one all-reduce."""
    return _Reduce.apply(partial, mesh)


def gather(part: Tensor, mesh: DeviceMesh, dim: int, length: int | None = None) -> Tensor:
    """The ranks' parts beside each other along a dim; what follows runs alike on every rank.

    The parts are as large on every rank; ``length`` is that of the result, by default all of it.

    Communication: forward one all-gather over ``mesh``; none backward.
    """
    return _Gather.apply(part, mesh, dim, part.shape[dim] * mesh.size() if length is None else length, False)


def scatter(whole: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """This rank's part of a replicated activation, as wide on every rank: zeros stand for what is missing at the end.

    Communication: forward none; backward one all-gather over ``mesh``.
    """
    return _Scatter.apply(whole, mesh, dim, False, False)


def scatter_to_sequence_region(whole: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """This rank's positions of a replicated activation; see [Note: positions that are divided].

    Communication: forward none; backward one all-gather over ``mesh``.
    """
    return _Scatter.apply(whole, mesh, dim, True, False)


def gather_from_sequence_region(part: Tensor, mesh: DeviceMesh, dim: int, length: int) -> Tensor:
    """All positions, of which this rank has a part, about to be used by each rank's part of a layer.

    Communication: forward one all-gather over ``mesh``; backward one reduce-scatter.
    """
    return _Gather.apply(part, mesh, dim, length, True)


def reduce_scatter_to_sequence_region(partial: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """This rank's positions of the sum of each rank's part of an activation.

    Communication: forward one reduce-scatter over ``mesh``; backward one all-gather.
    """
    return _Scatter.apply(partial, mesh, dim, True, True)


def seen_in_part(parameter: Tensor, mesh: DeviceMesh) -> Tensor:
    """A replicated parameter, about to be used on this rank's part; see [Note: gradients of a part].

    Communication: none; where ``torch.autograd.grad`` is asked for its gradient, one all-reduce of it over ``mesh``.
    """
    if torch.compiler.is_compiling():
        return scaled_gradient(parameter, mesh.size())
    return _SeenInPart.apply(parameter, mesh)


def scaled_gradient(tensor: Tensor, factor: float) -> Tensor:
    """The same tensor, whose gradient is multiplied by a number. Communication: none."""
    return _Scaled.apply(tensor, factor)


def all_reduce(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over the axis, in a new tensor, not differentiable. Communication: one all-reduce."""
    return functional.wait_tensor(functional.all_reduce(tensor.contiguous(), "sum", mesh))


def _all_gather(part: Tensor, mesh: DeviceMesh, dim: int, length: int) -> Tensor:
    stacked = functional.wait_tensor(functional.all_gather_tensor(part.contiguous(), 0, mesh))
    width = part.shape[dim]
    parts = stacked.chunk(mesh.size()) if len(part) else [part] * mesh.size()
    return torch.cat([p.narrow(dim, 0, present(i, width, length)) for i, p in enumerate(parts)], dim)


def _reduce_scatter(whole: Tensor, mesh: DeviceMesh, dim: int, repeat: bool) -> Tensor:
    parts = torch.cat([_own(whole, rank, mesh.size(), dim, repeat) for rank in range(mesh.size())])
    return functional.wait_tensor(functional.reduce_scatter_tensor(parts, "sum", 0, mesh))


def _own(whole: Tensor, rank: int, num_ranks: int, dim: int, repeat: bool) -> Tensor:
    """A rank's positions; what is missing at the end is the last one again, or zeros."""
    length = whole.shape[dim]
    width = -(-length // num_ranks)
    own = whole.narrow(dim, min(rank * width, length), present(rank, width, length))
    missing = width - own.shape[dim]
    if not missing:
        return own
    last = whole.narrow(dim, length - 1, 1) if repeat else torch.zeros_like(whole.narrow(dim, 0, 1))
    shape = [missing if d == dim else -1 for d in range(whole.ndim)]
    return torch.cat([own, last.expand(shape)], dim)


def present(rank: int, width: int, length: int) -> int:
    """How many of a rank's ``width`` positions there are, of ``length`` altogether."""
    return min(max(length - rank * width, 0), width)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Reduce.apply(gradient, ctx.mesh), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return all_reduce(partial, mesh)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Copy.apply(gradient, ctx.mesh), None


class _Gather(torch.autograd.Function):
    """The parts beside each other; ``sums`` where each rank's gradient is a part of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, mesh: DeviceMesh, dim: int, length: int, sums: bool) -> Tensor:
        ctx.mesh, ctx.dim, ctx.sums = mesh, dim, sums
        return _all_gather(part, mesh, dim, length)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Scatter.apply(gradient, ctx.mesh, ctx.dim, False, ctx.sums), None, None, None, None


class _Scatter(torch.autograd.Function):
    """This rank's part of the whole, or, if it ``sums``, of the sum of the ranks' tensors."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, mesh: DeviceMesh, dim: int, repeat: bool, sums: bool) -> Tensor:
        ctx.mesh, ctx.dim, ctx.length, ctx.sums = mesh, dim, whole.shape[dim], sums
        if sums:
            return _reduce_scatter(whole, mesh, dim, repeat)
        return _own(whole, mesh.get_local_rank(), mesh.size(), dim, repeat).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Gather.apply(gradient, ctx.mesh, ctx.dim, ctx.length, ctx.sums), None, None, None, None


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class _SeenInPart(_Copy):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if returns_gradient(ctx.next_functions[0][0]):
            return reduce_from_tensor_region(gradient, ctx.mesh), None
        return gradient * ctx.mesh.size(), None
