"""What a user says of the shard axis, and the units that this gives beside the blocks: large layers, blocks' parts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized
from torchmetrics import Metric

from lightning_dist.dtensors import local_part
from lightning_dist.layout import Layout
from lightning_dist.parallel.tensor.block_pair import Block
from lightning_dist.parallel.tensor.region import Region
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
        max_unit_parameters: of how many elements a unit is at most, see :func:`parts_of_blocks`.
        prefetch_units: how many units are gathered ahead of the one that runs, in their order in the module.
    """

    reshard_after_forward: bool = True
    large_layers: bool = False
    cpu_offload: bool = False
    max_unit_parameters: int | None = None
    prefetch_units: int = 1

    def __post_init__(self) -> None:
        for name, value in (("max_unit_parameters", self.max_unit_parameters), ("prefetch_units", self.prefetch_units)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")

    def validate(self, layout: Layout) -> None:
        """Raises a ValueError where what is asked has no meaning under the layout, or is to come."""
        if self.cpu_offload and (layout.dp_shard == 1 or layout.tp > 1 or layout.pp > 1):
            raise ValueError(
                f"cpu_offload=True under layout {layout}: what dp_shard divides is kept on the host, alone or beside "
                "dp_replicate; leave it out, or use those axes"
            )
        if self.cpu_offload and self.max_unit_parameters is not None:
            raise ValueError(
                f"max_unit_parameters={self.max_unit_parameters} with cpu_offload=True: a block may use the weight of "
                "a layer that it does not call, which would be on the host then; choose smaller units by shard_units="
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


def parts_of_blocks(blocks: dict[str, nn.Module], limit: int | None) -> dict[str, nn.Module]:
    """What is a unit of its own so that none has more elements than ``limit``, by name: of a block that has more, the
    largest children, and of those the largest of theirs, until what is left fits. A layer is not divided further, nor
    is a block that the tensor axis compares with the whole one, see [Note: pairs in a block].
    """
    found: dict[str, nn.Module] = {}
    for name, block in blocks.items() if limit is not None else ():
        assert limit is not None
        if isinstance(Region.of(block), Block):
            continue
        left = _held_elements(block)
        children = [(f"{name}.{key}", child) for key, child in _called_children(block) if _held_elements(child)]
        for key, child in sorted(children, key=lambda item: -_held_elements(item[1])):
            if left <= limit:
                break
            left -= _held_elements(child)
            found |= {key: child, **parts_of_blocks({key: child}, limit)}
    return found


def _called_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those that run by being called; what a container without a forward holds in place of it."""
    if isinstance(module, nn.MultiheadAttention) or is_parametrized(module):
        return  # which computes with its children's weights
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from ((f"{name}.{key}", inner) for key, inner in _called_children(child))
        elif not isinstance(child, (Metric, nn.ParameterList, nn.ParameterDict)):
            yield name, child


def _held_elements(module: nn.Module) -> int:
    return sum(local_part(p).numel() for p in module.parameters() if not is_placeholder(p))


def kept_gathered(module: nn.Module, units: dict[str, nn.Module], blocks: Collection[str]) -> set[str]:
    """Names of the units that stay gathered from forward to backward, as a root does: those after the last block, whose
    backward comes first.
    """
    inside = tuple(f"{block}." for block in blocks)
    order = [name for name, _ in module.named_modules() if name in units and not name.startswith(inside)]
    last = max((index for index, name in enumerate(order) if name in blocks), default=len(order))
    return set(order[last + 1 :])
