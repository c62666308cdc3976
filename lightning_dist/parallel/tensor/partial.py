"""Replicated parameters that each rank uses on its part: how their gradients add up.

[Note: gradients of a part]
The weight of a norm of heads is used by each rank on its heads, so that the sum of the ranks' gradients is the
gradient; but a penalty in the loss uses the same weight alike on every rank, and its gradient is the whole already. To
tell them apart, a region sees such a weight through a view that multiplies its gradient by the number of ranks. At the
end the mean over the ranks is the sum of the parts and one of the wholes, in one all-reduce for all such weights (see
:class:`~lightning_dist.parallel.tensor.axis.TensorAxis`); and what was summed already keeps its value under a mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightning_dist.compat.torch import returns_gradient
from lightning_dist.parallel.tensor.mappings import reduce_from_tensor_region


def seen_in_part(parameter: Tensor, mesh: DeviceMesh) -> Tensor:
    """A replicated parameter, about to be used on this rank's part; see [Note: gradients of a part].

    Communication: none; where ``torch.autograd.grad`` is asked for its gradient, one all-reduce of it over ``mesh``.
    """
    if torch.compiler.is_compiling():
        return _Multiplied.apply(parameter, mesh.size())
    return _SeenInPart.apply(parameter, mesh)


class _Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, times: int) -> Tensor:
        ctx.times = times
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.times, None


class _SeenInPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if returns_gradient(ctx.next_functions[0][0]):
            return reduce_from_tensor_region(gradient, ctx.mesh), None
        return gradient * ctx.mesh.size(), None
