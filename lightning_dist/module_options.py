"""What a user says of the module beside the layout, to a strategy of the Trainer or of Fabric."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_dist.layout import Layout
from lightning_dist.parallel import Checkpointing
from lightning_dist.parallel.pipeline import PipelineOptions
from lightning_dist.plans import find_blocks, select_blocks
from lightning_dist.plans.tensor import TensorOptions

ShardUnits = Iterable[str | type[nn.Module]] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class ModuleOptions:
    """What a user says of the module beside the layout.

    Args:
        shard_units: the modules to shard one by one; None for the repeated blocks.
        tensor: of the tensor axis.
        activation_checkpointing: what blocks compute again in backward.
        compile: keyword arguments of ``torch.compile`` for the blocks; None to compile nothing.
        pipeline: of the pipeline axis.
    """

    shard_units: ShardUnits | None = None
    tensor: TensorOptions = field(default_factory=TensorOptions)
    activation_checkpointing: Checkpointing = "none"
    compile: dict[str, Any] | None = None
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)

    def blocks(self, module: nn.Module) -> dict[str, nn.Module]:
        """The modules that are sharded, recomputed and compiled one by one, by name."""
        return find_blocks(module) if self.shard_units is None else select_blocks(module, self.shard_units)

    def keeps_blocks_whole(self, layout: Layout) -> bool:
        """Whether something is done to blocks that a cut inside of them would break."""
        recomputes = self.activation_checkpointing != "none"
        return layout.holds_parts_of_blocks or self.compile is not None or recomputes

    @property
    def recomputes(self) -> bool:
        """Whether blocks compute something again in backward."""
        return self.activation_checkpointing != "none"
