"""Stand-ins for divided weights that are zero, which would hide what lies before them from a comparison.

Layers that write back are often initialised to zero, so that a network begins as an identity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_dist.dtensors import local_part
from lightning_dist.parallel.tensor.shards import shard_of


@contextmanager
def nonzero(module: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
    """While it lasts, matrices of a module that the axis divides, and that are zero on all ranks, have fixed values.

    Communication: one all-reduce over ``mesh`` of a number for each divided matrix.
    """
    divided = [p for p in module.parameters() if isinstance(p, DTensor) and p.ndim > 1 and p.device_mesh == mesh]
    zero = _are_zero(divided, mesh)
    for weight in zero:
        values = torch.arange(weight.numel(), device=weight.device, dtype=torch.float32).sin_()
        whole = values.div_(math.sqrt(weight.shape[-1])).to(weight.dtype).view(weight.shape)
        _memory(weight).copy_(shard_of(whole, weight.placements[0], mesh))
    try:
        yield
    finally:
        for weight in zero:
            _memory(weight).zero_()


def _are_zero(weights: Sequence[DTensor], mesh: DeviceMesh) -> list[DTensor]:
    if not weights:
        return []
    found = torch.stack([local_part(weight).any() for weight in weights]).float()
    dist.all_reduce(found, dist.ReduceOp.MAX, mesh.get_group())
    return [weight for weight, is_nonzero in zip(weights, found.tolist(), strict=True) if not is_nonzero]


def _memory(weight: DTensor) -> Tensor:
    """What this rank holds; writing there is not seen by autograd, which may have saved the weight."""
    return local_part(weight).data
