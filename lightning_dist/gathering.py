"""Gathering from other ranks what a loss of all samples needs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor


def all_gather(tensor: Tensor, group: dist.ProcessGroup, sync_grads: bool) -> Tensor:
    """The tensors of a group's ranks, in their order.

    torch's own differentiable gather sends its gradients to ranks of the world instead of the group's on the CPU
    (``torch.distributed.nn.functional``, seen in torch 2.14).

    Args:
        tensor: with the same shape on every rank.
        group: to gather from.
        sync_grads: differentiable, to any order; the gradient is the sum of those of all ranks.

    Returns:
        (ranks, *shape).

    Communication: forward one all-gather over the group, backward one reduce-scatter.
    """
    if sync_grads:
        return _Gathered.apply(tensor, group)
    with torch.no_grad():
        return _gathered(tensor, group)


def refuse_uneven(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Raises on every rank of the group if they bring tensors of different shapes, which would end the processes.

    Communication: one all-gather of shapes, as objects.

    Raises:
        ValueError: with the shapes.
    """
    shapes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(shapes, tuple(tensor.shape), group)
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"all_gather after the run was given tensors of shapes {', '.join(map(str, shapes))} on the data ranks: "
            "gather in on_predict_epoch_end or the like, where ranks may have different numbers of rows, or pad them"
        )


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    return functional.wait_tensor(functional.all_gather_tensor(tensor.unsqueeze(0).contiguous(), 0, group))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Summed.apply(gradient, ctx.group), None


class _Summed(torch.autograd.Function):
    """This rank's of a tensor for each rank, summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensors: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        summed = functional.reduce_scatter_tensor(tensors.contiguous(), "sum", 0, group)
        return functional.wait_tensor(summed).squeeze(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Gathered.apply(gradient, ctx.group), None
