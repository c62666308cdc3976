"""Copies of parameters that ranks hold each for itself stay equal."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_dist.collectives import broadcast_tensors
from lightning_dist.dtensors import local_part


@torch.no_grad()
def make_copies_equal(parameters: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Gives every rank the first one's values of what differs, and says so.

    A hook that draws random numbers (a head that is initialised anew, noise on weights) draws other ones on each data
    rank, and copies that differ once drift apart for good. One process has one draw: the first rank's is taken.

    Args:
        parameters: of which the ranks of the group hold the same part, in the same order.
        group: those ranks.

    Communication: one all-reduce of 16 bytes a parameter over the group, and a wait of the host for it; a broadcast of
    what differs.
    """
    tensors = [t for t in map(local_part, parameters) if t.numel() and t.is_floating_point()]
    if not tensors:
        return
    marks = torch.stack(
        [torch.linalg.vector_norm(t, dtype=torch.float64) + t.sum(dtype=torch.float64) for t in tensors]
    )
    extremes = torch.cat([marks, -marks])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    most, least = extremes.chunk(2)
    differ = [index for index, same in enumerate((most == -least).tolist()) if not same]
    if differ:
        broadcast_tensors([tensors[index] for index in differ], group)
        rank_zero_warn(
            f"{len(differ)} parameters had other values on other data ranks, written by code that draws random numbers "
            "or reads a rank's own samples; all ranks now have the first one's"
        )
