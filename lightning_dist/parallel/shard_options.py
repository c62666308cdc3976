"""What a user says of the shard axis, and the units that this gives beside the blocks: large layers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor
from torchmetrics import Metric

from lightning_dist.layout import Layout
from lightning_dist.placeholder import is_placeholder

LARGE = 2**24
"""Elements of a layer that is a unit of its own: 64 MiB in float32, about as much as is sent at once elsewhere."""


@dataclass(frozen=True)
class ShardOptions:
    """What a user says of the shard axis; see :class:`~lightning_dist.HybridStrategy`.

    Args:
        reshard_after_forward: free what was gathered for a unit's forward, and gather it again for its backward.
        large_layers: whether large layers beside the blocks are units, see :func:`large_layers`.
        cpu_offload: keep what is divided on the host: parameters, gradients, and with them optimizer states.
    """

    reshard_after_forward: bool = True
    large_layers: bool = False
    cpu_offload: bool = False

    def validate(self, layout: Layout) -> None:
        """Raises a ValueError where what is asked has no meaning under the layout, or is to come."""
        if self.cpu_offload and (layout.dp_shard == 1 or layout.tp > 1 or layout.pp > 1):
            raise ValueError(
                f"cpu_offload=True under layout {layout}: what dp_shard divides is kept on the host, alone or beside "
                "dp_replicate; leave it out, or use those axes"
            )

    def offload_policy(self, device: torch.device) -> OffloadPolicy:
        """Where fully_shard keeps a rank's parts: on the device, or in pinned memory of the host."""
        return CPUOffloadPolicy(pin_memory=device.type != "cpu") if self.cpu_offload else OffloadPolicy()


def large_layers(module: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Dense and embedding layers of :data:`LARGE` parameters and more that are in no block, by name.

    In the root an embedding and a head would be gathered together before the step, stay so until its end, and be
    reduced together after it, with nothing to compute meanwhile. What is tied stays in the root, see
    :func:`~lightning_dist.parallel.fsdp_units.shard_units`; so does what the tensor axis divided, and all of a network
    without blocks. A weight that a step uses without calling its layer is gathered for that use.
    """
    inside = {id(c) for b in blocks.values() for c in b.modules()}
    inside |= {id(c) for m in module.modules() if isinstance(m, (Metric, nn.MultiheadAttention)) for c in m.modules()}
    return {
        name: layer
        for name, layer in module.named_modules()
        if blocks
        and id(layer) not in inside
        and isinstance(layer, (nn.Linear, nn.Embedding))
        and not any(True for _ in layer.children())  # a parametrised one computes its weight of others
        and not any(isinstance(p, DTensor) or is_placeholder(p) for p in layer.parameters())
        and sum(p.numel() for p in layer.parameters()) >= LARGE
    }


def kept_gathered(module: nn.Module, units: dict[str, nn.Module], blocks: Collection[str]) -> set[str]:
    """Names of the units that stay gathered from forward to backward, as a root does: those after the last block, whose
    backward comes first.
    """
    order = [name for name, _ in module.named_modules() if name in units]
    last = max((index for index, name in enumerate(order) if name in blocks), default=len(order))
    return set(order[last + 1 :])
