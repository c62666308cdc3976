"""What each axis does to a module; the order of the transforms is written here and nowhere else."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from lightning_dist.layout import Layout, ParallelMesh
from lightning_dist.parallel.checkpointing import Checkpointing, checkpoint_activations, refuse_no_blocks
from lightning_dist.parallel.data import Alone, average_buffers
from lightning_dist.parallel.pipeline import PartitionedModule, PipelineOptions, PipelineRunner
from lightning_dist.parallel.replicated import Replicated
from lightning_dist.parallel.sharded import Sharded
from lightning_dist.parallel.tensor import TensorAxis, refuse_compiled_hooks, split
from lightning_dist.patches import Patches
from lightning_dist.placeholder import is_placeholder
from lightning_dist.plans.tensor import ShardingPlan, partial_parameters

__all__ = [
    "Alone",
    "Checkpointing",
    "Replicated",
    "Sharded",
    "average_buffers",
    "parallelize",
    "refuse_no_blocks",
]


def parallelize(
    module: nn.Module,
    layout: Layout,
    mesh: ParallelMesh | None,
    *,
    sharding_plan: ShardingPlan | None,
    blocks: dict[str, nn.Module],
    policy: MixedPrecisionPolicy,
    device: torch.device,
    activation_checkpointing: Checkpointing,
    compile_options: dict[str, Any] | None,
    training: bool,
    patches: Patches,
    partitioned: PartitionedModule | None = None,
    pipeline_options: PipelineOptions | None = None,
) -> Alone:
    """Applies the layout to a module, in place.

    In this order: divide layers, recompute block by block, compile block by block, then shard, or replicate.

    May be called again for a module that has been through it: what is done stays.

    Args:
        module: as the user wrote it, a LightningModule or, under Fabric, any module; its parameters on ``device``, or
            on meta.
        layout: resolved.
        mesh: of the layout; None for one process.
        sharding_plan: what the tensor axis does; None without that axis.
        blocks: the repeated parts, by name.
        policy: dtypes of sharded units.
        device: of this rank.
        activation_checkpointing: what the blocks recompute in backward, see :func:`checkpoint_activations`.
        compile_options: keyword arguments of ``torch.compile``; None to leave the module as it is.
        training: whether gradients will be asked for.
        patches: note what is put onto the module; undone, its parameters are still divided.
        partitioned: the stages of the module, of which it holds this rank's; None without that axis.
        pipeline_options: the user's.

    Returns:
        What runs the module's steps under the layout.

    Communication: replicate broadcasts the first data rank's parameters and buffers once; see its class and
    :class:`Sharded` for what a step costs.
    """
    tensor: TensorAxis | None = None
    blocks = {name: block for name, block in blocks.items() if _is_held(block)}
    if sharding_plan is not None:
        assert mesh is not None
        sharding_plan = _held_plan(module, sharding_plan)
        split(module, sharding_plan, mesh.root["tp"], patches=patches)
        tensor = TensorAxis(module, partial_parameters(module, sharding_plan), mesh.root["tp"])
    checkpoint_activations(module, blocks, activation_checkpointing if training else "none")
    if compile_options is not None:
        refuse_compiled_hooks(module)
        _compile(module, blocks, compile_options)
    if partitioned is None:
        parallel = _over_data(module, layout, mesh, blocks, policy, device, training)
        parallel.tensor = tensor
        return parallel
    assert mesh is not None
    assert pipeline_options is not None
    assert isinstance(module, pl.LightningModule)
    inner, data_group = Alone(module), None
    if layout.dp_shard > 1:
        inner = _over_data(module, layout, mesh, blocks, policy, device, training, one_backward=True)
    elif layout.num_data_ranks > 1:
        data_group = mesh.data.get_group()
    inner.tensor = tensor
    group = mesh.root["pp"].get_group()
    return PipelineRunner(module, partitioned, pipeline_options, group, device, inner, data_group, patches)


def _is_held(module: nn.Module) -> bool:
    """Whether this rank's stages have it; no stage has a part of a block."""
    return not any(is_placeholder(p) for p in module.parameters())


def _held_plan(module: nn.Module, sharding_plan: ShardingPlan) -> ShardingPlan:
    """What this rank's stages have of it."""
    plan = {name: part for name, part in sharding_plan.tensor_plan.items() if _is_held(module.get_submodule(name))}
    blocks = [[n for n in names if _is_held(module.get_submodule(n))] for names in sharding_plan.sequence_blocks]
    return ShardingPlan(plan, [names for names in blocks if names], sharding_plan.loss_parallel)


def _over_data(
    module: nn.Module,
    layout: Layout,
    mesh: ParallelMesh | None,
    blocks: dict[str, nn.Module],
    policy: MixedPrecisionPolicy,
    device: torch.device,
    training: bool,
    one_backward: bool = False,
) -> Alone:
    if mesh is None or layout.num_data_ranks == 1:
        return Alone(module)
    if layout.holds_shards:  # DDP holds no DTensors: beside the tensor axis, copies are made by fully_shard too
        axes = ("dp_replicate", "dp_shard") if layout.dp_replicate > 1 else ("dp_shard",)
        return Sharded(module, mesh.root[axes], blocks, policy, mesh.data.get_group(), one_backward)
    return Replicated(module, mesh.data.get_group(), device) if training else Alone(module)


def _compile(module: nn.Module, blocks: dict[str, nn.Module], options: dict[str, Any]) -> None:
    """Compiles the blocks in place; a network without blocks as a whole. State-dict names stay."""
    targets = list(blocks.values()) or [child for child in module.children() if any(True for _ in child.parameters())]
    for target in targets:
        # fully_shard's hooks have to lie outside of what is compiled: only a module it has not seen is
        if target._compiled_call_impl is None and not isinstance(target, FSDPModule):
            target.compile(**options)
