"""The tensor axis in a step, beside its regions: gradients of which every rank has a part."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_dist.collectives import all_reduce_tensors
from lightning_dist.dtensors import local_part
from lightning_dist.parallel.tensor.region import Region
from lightning_dist.parallel.tensor.sequence_block import SequenceBlock


class TensorAxis:
    """Sums the gradients of replicated parameters that each rank used on its part only: norms of heads, and under
    sequence parallel all that is not divided in the blocks. See [Note: gradients of a part].

    Communication: one all-reduce of their gradients, flat, over ``mesh`` per backward pass that reduces; none while
    accumulating, none if there are no such parameters.

    Args:
        module: divided.
        partial: names of those parameters.
        mesh: of the tensor axis.
    """

    def __init__(self, module: nn.Module, partial: Iterable[str], mesh: DeviceMesh) -> None:
        self.module, self.partial, self.mesh = module, list(partial), mesh
        blocks = [region for m in module.modules() if isinstance(region := Region.of(m), SequenceBlock)]
        self._positions = {id(block.positions): block.positions for block in blocks if block.positions is not None}
        for name in self.partial:
            _see_in_part(module, name)

    def after_step(self) -> None:
        """Called after the network ran.

        Raises:
            ValueError: a stack of sequence-parallel blocks did not run to its last, so that what came out is a part.
        """
        for positions in self._positions.values():
            positions.refuse_open()

    def _gradients(self) -> list[Tensor]:
        parameters = dict.fromkeys(self.module.get_parameter(name) for name in self.partial)  # tied ones once
        return [p.grad for p in parameters if p.grad is not None]

    @torch.no_grad()
    def after_backward(self) -> None:
        """Sums; called after backward passes that reduce."""
        all_reduce_tensors(map(local_part, self._gradients()), self.mesh.get_group(), mean=True)


def _see_in_part(module: nn.Module, name: str) -> None:
    """Tells the outermost region around a parameter that it uses it in part."""
    owner, _, _ = name.rpartition(".")
    parts = owner.split(".") if owner else []
    around = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
    regions = [(outer, region) for outer in around if (region := Region.of(module.get_submodule(outer))) is not None]
    outer, region = next((found for found in regions if isinstance(found[1], SequenceBlock)), regions[-1])
    below = name[len(outer) + 1 :] if outer else name
    if below not in region.partial:
        region.partial.append(below)
