"""Private names of torch's process groups."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_dist.compat.names import uses


@uses(
    "torch.distributed.distributed_c10d.ProcessGroup._get_backend",
    "torch.distributed.distributed_c10d.ProcessGroupGloo._Options._timeout",
)
def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """Gives the timeout of a group's collectives for tensors of a device."""
    return group._get_backend(device).options._timeout
