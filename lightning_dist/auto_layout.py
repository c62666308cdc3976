"""The layout ``"auto"``: replicate what fits on a device, shard what doesn't."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn

from lightning_dist.layout import Layout

STATES_PER_WEIGHT = 3
"""Numbers kept beside each trainable one: its gradient and AdamW's two moments."""

ROOM = 0.6
"""Share of the memory that parameters, gradients and optimizer states may take; the rest is for activations."""


def choose_layout(module: nn.Module, world_size: int, device: torch.device, ranks_per_node: int) -> tuple[Layout, str]:
    """The layout with the fewest shards under which the module's states fit, and why.

    Args:
        module: whole, on any device or on meta.
        world_size: number of ranks.
        device: of this rank.
        ranks_per_node: processes that share a node's memory where the device is the CPU.

    Communication: one all-reduce of one number over the world (the least memory of any rank counts).
    """
    memory = _memory(device, ranks_per_node)
    if dist.is_initialized():
        least = torch.tensor(memory, dtype=torch.int64, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        memory = int(least)
    needed = state_bytes(module)
    fitting = [s for s in range(1, world_size + 1) if world_size % s == 0 and needed / s <= ROOM * memory]
    shards = fitting[0] if fitting else world_size
    layout = Layout(dp_replicate=world_size // shards, dp_shard=shards)
    room = f"{ROOM:.0%} of the {memory / 2**30:.3g} GiB of a rank"
    states = f"parameters, gradients and AdamW's states take {needed / 2**30:.3g} GiB"
    if not fitting:
        return layout, f"{states}; even over {shards} shards that is more than {room}"
    if shards == 1:
        return layout, f"{states}, which fits {room}"
    return layout, f"{states}; over {shards} shards that fits {room}"


def state_bytes(module: nn.Module) -> int:
    """Bytes of parameters, gradients and AdamW's states of the whole module in training."""
    return sum(p.nbytes * (1 + STATES_PER_WEIGHT * p.requires_grad) for p in module.parameters())


def _memory(device: torch.device, ranks_per_node: int) -> int:
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // ranks_per_node
    return torch.get_device_module(device).mem_get_info(device)[0]
