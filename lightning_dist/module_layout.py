"""A layout applied to a module, by the strategies of the Trainer and of Fabric: the user's options, and the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from lightning_dist.compat.torch import has_gradient_hooks
from lightning_dist.divided import divide
from lightning_dist.divided.compiled import show_parts_to_compiled
from lightning_dist.layout import Layout, ParallelMesh
from lightning_dist.parallel import Checkpointing, SingleProcessRunner, parallelize
from lightning_dist.parallel.buffers import make_copies_equal, share_batch_statistics
from lightning_dist.parallel.pipeline import PartitionedModule, PipelineOptions
from lightning_dist.parallel.replaced import Replaced
from lightning_dist.parallel.shard_options import ShardOptions
from lightning_dist.patches import Patches
from lightning_dist.placeholder import held
from lightning_dist.plans import find_blocks, select_blocks
from lightning_dist.plans.tensor import ShardingPlan, TensorOptions
from lightning_dist.ranks import LayoutRanks
from lightning_dist.validation import validate_kept_hooks

ShardUnits = Iterable[str | type[nn.Module]] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class ModuleOptions:
    """What a user says of the module beside the layout; see :class:`~lightning_dist.HybridStrategy`."""

    shard_units: ShardUnits | None = None
    tensor: TensorOptions = field(default_factory=TensorOptions)
    activation_checkpointing: Checkpointing = "none"
    compile: dict[str, Any] | None = None
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    max_unit_parameters: int | None = None
    prefetch_units: int = 1

    def __post_init__(self) -> None:
        one_of("activation_checkpointing", self.activation_checkpointing, "none", "full", "selective")
        one_of("reshard_after_forward", self.reshard_after_forward, True, False)
        one_of("cpu_offload", self.cpu_offload, True, False)
        _ = self.shards  # which refuses what is no number

    def blocks(self, module: nn.Module) -> dict[str, nn.Module]:
        """The modules that are sharded, recomputed and compiled one by one, by name."""
        return find_blocks(module) if self.shard_units is None else select_blocks(module, self.shard_units)

    @property
    def shards(self) -> ShardOptions:
        """Those of the shard axis; who says what the units are has no others. A weight that a step uses without calling
        its layer is on the device in the root only, if parts are on the host.
        """
        large_layers = self.shard_units is None and not self.cpu_offload
        limits = self.max_unit_parameters, self.prefetch_units
        return ShardOptions(bool(self.reshard_after_forward), large_layers, bool(self.cpu_offload), *limits)

    def keeps_blocks_whole(self, layout: Layout) -> bool:
        """Whether something is done to blocks that a cut inside of them would break."""
        return layout.holds_parts_of_blocks or self.compile is not None or self.recomputes

    @property
    def recomputes(self) -> bool:
        """Whether blocks compute something again in backward."""
        return self.activation_checkpointing != "none"


def compile_options(asked: bool | Mapping[str, Any]) -> dict[str, Any] | None:
    """Keyword arguments of ``torch.compile`` that a strategy's ``compile`` stands for; None for False."""
    return None if asked is False else {} if asked is True else dict(asked)


def one_of(name: str, value: Any, *choices: Any) -> Any:
    """The value of a strategy's argument; raises a ValueError for one that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")
    return value


def apply_layout(
    module: nn.Module,
    ranks: LayoutRanks,
    options: ModuleOptions,
    blocks: dict[str, nn.Module],
    plan: ShardingPlan | None,
    policy: MixedPrecisionPolicy,
    patches: Patches,
    owners: Iterable[object],
    *,
    training: bool = True,
    in_lists: bool = False,
    partition: Callable[[], PartitionedModule | None] = lambda: None,
    materialize: Callable[[], None] = lambda: None,
) -> tuple[SingleProcessRunner, dict[str, nn.Parameter]]:
    """Parallelizes a module in place, and shows the user's code what it had before.

    Args:
        module: on the host but for its buffers, on this rank's device, or deferred.
        ranks, options, blocks, plan, policy, patches, training: see :func:`~lightning_dist.parallel.parallelize`, also
            for the communication.
        owners, in_lists: who may hold its parameters, see :class:`~lightning_dist.parallel.replaced.Replaced`.
        partition: cuts the module into stages, before it is divided.
        materialize: gives what is deferred its values, when it is divided.

    Returns:
        What runs its steps, and the parameters that were replaced, by name.
    """
    assert ranks.layout is not None
    hooked = {name: p for name, p in module.named_parameters() if has_gradient_hooks(p)}
    replaced = Replaced(module, in_lists)
    runner = parallelize(
        module,
        ranks.layout,
        ranks.mesh,
        sharding_plan=plan,
        policy=policy,
        device=ranks.device,
        blocks=blocks,
        activation_checkpointing=options.activation_checkpointing,
        compile_options=options.compile,
        training=training,
        patches=patches,
        partitioned=partition(),
        pipeline_options=options.pipeline,
        shard_options=options.shards,
    )
    if ranks.mesh is None:
        return runner, {}
    share_batch_statistics(module, ranks.mesh.data.get_group(), patches)
    validate_kept_hooks(module, hooked)
    hooked.clear()
    runner.reshard()
    materialize()
    replaced.exchange(module, owners)
    divide(module)
    runner.show()
    show_parts_to_compiled(module, patches)
    return runner, replaced.originals


def make_parameters_equal(module: nn.Module, mesh: ParallelMesh) -> None:
    """Makes the data ranks' copies of each parameter, or of each shard of it, equal; see :func:`make_copies_equal`."""
    parameters = held(module.parameters())
    shards = [p for p in parameters if isinstance(p, DTensor) and "dp_shard" in (p.device_mesh.mesh_dim_names or ())]
    apart = {id(p) for p in shards}
    if mesh.data.size() > 1:
        make_copies_equal((p for p in parameters if id(p) not in apart), mesh.data.get_group())
    if shards and mesh.root["dp_replicate"].size() > 1:
        make_copies_equal(shards, mesh.root["dp_replicate"].get_group())
