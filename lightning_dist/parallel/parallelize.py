"""What each axis does to a module; the order of the transforms is written here and nowhere else."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from lightning_dist.compat.torch import COMPILED_CALL, compiled_call
from lightning_dist.divided.compiled import compile_inside_of_hooks
from lightning_dist.layout import Layout, ParallelMesh
from lightning_dist.parallel.activation_checkpoint import Checkpointing, checkpoint_activations
from lightning_dist.parallel.ddp import DDPRunner
from lightning_dist.parallel.fsdp import FSDPRunner
from lightning_dist.parallel.pipeline import PartitionedModule, PipelineOptions, PipelineRunner
from lightning_dist.parallel.placing import to_device
from lightning_dist.parallel.shard_options import ShardOptions
from lightning_dist.parallel.single_process import SingleProcessRunner
from lightning_dist.parallel.tensor import TensorAxis, split, validate_no_compiled_hooks
from lightning_dist.patches import Patches
from lightning_dist.placeholder import is_placeholder
from lightning_dist.plans.tensor import ShardingPlan, partial_parameters

_DEFAULT = ShardOptions()


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
    shard_options: ShardOptions = _DEFAULT,
) -> SingleProcessRunner:
    """Applies the layout to a module, in place.

    In this order: divide layers, recompute block by block, compile block by block, then shard, or replicate. May be
    called again for a module whose patches were not undone: what is done stays.

    Memory of the device: a parameter that is divided goes there alone, one that is sharded with its unit; what this
    rank does not keep of them is freed before the next. What nothing divides goes at the end.

    Args:
        module: as the user wrote it, a LightningModule or, under Fabric, any module; its parameters on the host, on
            ``device``, or on meta, and its buffers on ``device``.
        layout, mesh: resolved, and its mesh; None for one process.
        sharding_plan: what the tensor axis does; None without that axis.
        blocks: the repeated parts, by name.
        policy: dtypes of sharded units.
        activation_checkpointing: what the blocks recompute in backward, see :func:`checkpoint_activations`.
        compile_options: keyword arguments of ``torch.compile``; None to leave the module as it is.
        training: whether gradients will be asked for.
        patches: that all that is put on the module goes through.
        shard_options: what the user says of the shard axis.
        partitioned: the stages of the module, of which it holds this rank's; None without that axis.

    Returns:
        What runs the module's steps under the layout.

    Communication: DDP broadcasts the first data rank's parameters and buffers once; see its class and
    :class:`FSDPRunner` for what a step costs.
    """
    blocks = {name: block for name, block in blocks.items() if _is_held(block)}
    tensor = None if sharding_plan is None else _divide(module, sharding_plan, mesh, patches)
    checkpoint_activations(module, blocks, activation_checkpointing if training else "none", patches)
    if compile_options is not None:
        validate_no_compiled_hooks(module)
        _compile(module, blocks, compile_options, patches)
    group = mesh.data.get_group() if mesh is not None and layout.num_data_ranks > 1 else None
    runner = SingleProcessRunner(module, tensor)
    # DDP holds no DTensors: beside the tensor axis, copies are made by fully_shard too
    if mesh is not None and group is not None and (layout.dp_shard > 1 or (layout.tp > 1 and partitioned is None)):
        sharded = mesh.root["dp_replicate", "dp_shard"] if layout.dp_replicate > 1 else mesh.root[("dp_shard",)]
        one_backward = partitioned is not None
        runner = FSDPRunner(module, sharded, blocks, policy, shard_options, group, patches, tensor, one_backward)
        group = None  # it averages over them
    to_device(module, device)
    if partitioned is None:
        return runner if group is None or not training else DDPRunner(module, group, device)
    assert mesh is not None
    assert pipeline_options is not None
    assert isinstance(module, pl.LightningModule)
    return PipelineRunner(module, partitioned, pipeline_options, mesh, device, runner, group, patches)


def _divide(module: nn.Module, sharding_plan: ShardingPlan, mesh: ParallelMesh | None, patches: Patches) -> TensorAxis:
    assert mesh is not None
    plan, axis = _held_plan(module, sharding_plan), mesh.root["tp"]
    split(module, plan, axis, patches=patches)
    return TensorAxis(module, partial_parameters(module, plan), axis)


def _is_held(module: nn.Module) -> bool:
    """By this rank's stages, none of which has a part of a block."""
    return not any(is_placeholder(p) for p in module.parameters())


def _held_plan(module: nn.Module, sharding_plan: ShardingPlan) -> ShardingPlan:
    plan = {name: part for name, part in sharding_plan.tensor_plan.items() if _is_held(module.get_submodule(name))}
    blocks = [[n for n in names if _is_held(module.get_submodule(n))] for names in sharding_plan.sequence_blocks]
    return ShardingPlan(plan, [names for names in blocks if names], sharding_plan.loss_parallel)


def _compile(module: nn.Module, blocks: dict[str, nn.Module], options: dict[str, Any], patches: Patches) -> None:
    """Compiles the blocks in place; a network without blocks as a whole. State-dict names stay."""
    targets = list(blocks.values()) or [child for child in module.children() if any(True for _ in child.parameters())]
    for target in targets:
        # fully_shard's hooks have to lie outside of what is compiled: only a module it has not seen is
        if compiled_call(target) is None and not isinstance(target, FSDPModule):
            compile_inside_of_hooks(target, options)
            patches.also(partial(vars(target).pop, COMPILED_CALL, None))
