"""The differentiable collectives of the tensor axis: where activations enter what is split, and where they leave it.

``enter`` and ``leave`` are each other's transpose (Megatron-LM's f and g, https://arxiv.org/abs/1909.08053,
and its sequence-parallel forms, https://arxiv.org/abs/2205.05198). A batch has the shape (batch, sequence, features);
positions are divided along dim 1, padded at the end to a multiple of the axis.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh


def enter(activation: Tensor, mesh: DeviceMesh) -> Tensor:
    """A replicated activation, about to be used by each rank's part.

    Communication: none forward; backward one all-reduce of the activation's bytes over ``mesh``.
    """
    return _Enter.apply(activation, mesh)


def leave(partial: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of what each rank's part computed, on every rank.

    Communication: forward one all-reduce of the activation's bytes over ``mesh``; none backward.
    """
    return _Leave.apply(partial, mesh)


def gather(part: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """The ranks' parts beside each other along a dim; what follows runs alike on every rank.

    Communication: forward one all-gather over ``mesh``; none backward.
    """
    return _Gather.apply(part, mesh, dim)


def all_reduce(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over the axis, in a new tensor. One all-reduce; not differentiable."""
    return functional.wait_tensor(functional.all_reduce(tensor.contiguous(), "sum", mesh))


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return activation.view_as(activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return all_reduce(gradient, ctx.mesh), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, mesh: DeviceMesh) -> Tensor:
        return all_reduce(partial, mesh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
        ctx.mesh, ctx.dim = mesh, dim
        parts = functional.wait_tensor(functional.all_gather_tensor(part.contiguous(), 0, mesh))
        return torch.cat(parts.chunk(mesh.size()), dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.chunk(ctx.mesh.size(), ctx.dim)[ctx.mesh.get_local_rank()], None, None
