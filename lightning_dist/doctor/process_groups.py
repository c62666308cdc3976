"""What ranks begin with: the world's process group, on the device of this rank."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from torch.distributed.constants import default_pg_timeout

from lightning_dist.doctor.settings import Settings
from lightning_dist.layout import Layout
from lightning_dist.ranks import LayoutRanks


def join(settings: Settings, layout: str | None = None, timeout: timedelta = default_pg_timeout) -> LayoutRanks:
    """Forms the groups that a strategy of this layout would form.

    Args:
        settings: of the examination.
        layout: None for the world alone.
        timeout: asked for.

    Communication: the meeting of the ranks.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    devices = [device_of(settings, rank) for rank in range(settings.num_ranks)]
    if devices[0].type != "cpu":
        torch.accelerator.set_device_index(local_rank)
    environment = TorchElasticEnvironment()
    ranks = LayoutRanks(Layout.parse(layout), timeout=timeout)
    ranks.place(environment, devices, num_nodes=1)
    ranks.join(environment)
    ranks.form_mesh()
    return ranks


def device_of(settings: Settings, local_rank: int) -> torch.device:
    """The device of a rank."""
    return torch.device("cpu") if settings.device_type == "cpu" else torch.device(settings.device_type, local_rank)
