"""What each axis does to a module; the order of the transforms is written here and nowhere else."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from lightning_dist.compat.torch import COMPILED_CALL, compiled_call
from lightning_dist.layout import Layout, ParallelMesh
from lightning_dist.parallel.activation_checkpoint import Checkpointing, checkpoint_activations
from lightning_dist.parallel.ddp import DDPRunner
from lightning_dist.parallel.fsdp import FSDPRunner
from lightning_dist.parallel.pipeline import Cut, Pipelined, PipelineOptions
from lightning_dist.parallel.single_process import SingleProcessRunner
from lightning_dist.parallel.tensor import TensorAxis, refuse_compiled_hooks, split
from lightning_dist.patches import Patches
from lightning_dist.placeholder import is_placeholder
from lightning_dist.plans.tensor import Division, partial_parameters


def parallelize(
    module: nn.Module,
    layout: Layout,
    mesh: ParallelMesh | None,
    *,
    division: Division | None,
    blocks: dict[str, nn.Module],
    policy: MixedPrecisionPolicy,
    device: torch.device,
    activation_checkpointing: Checkpointing,
    compile_options: dict[str, Any] | None,
    training: bool,
    patches: Patches,
    cut: Cut | None = None,
    pipeline_options: PipelineOptions | None = None,
) -> SingleProcessRunner:
    """Applies the layout to a module, in place.

    In this order: divide layers, recompute block by block, compile block by block, then shard, or replicate.

    May be called again for a module whose patches were not undone: what is done stays.

    Args:
        module: as the user wrote it, a LightningModule or, under Fabric, any module; its parameters on ``device``, or
            on meta.
        layout: resolved.
        mesh: of the layout; None for one process.
        division: what the tensor axis does; None without that axis.
        blocks: the repeated parts, by name.
        policy: dtypes of sharded units.
        device: of this rank.
        activation_checkpointing: what the blocks recompute in backward, see :func:`checkpoint_activations`.
        compile_options: keyword arguments of ``torch.compile``; None to leave the module as it is.
        training: whether gradients will be asked for.
        patches: that all that is put on the module goes through.
        cut: the stages of the module, of which it holds this rank's; None without that axis.
        pipeline_options: the user's.

    Returns:
        What runs the module's steps under the layout.

    Communication: DDP broadcasts the first data rank's parameters and buffers once; see its class and
    :class:`FSDPRunner` for what a step costs.
    """
    blocks = {name: block for name, block in blocks.items() if _is_held(block)}
    tensor = None if division is None else _divide(module, division, mesh)
    checkpoint_activations(module, blocks, activation_checkpointing if training else "none", patches)
    if compile_options is not None:
        refuse_compiled_hooks(module)
        _compile(module, blocks, compile_options, patches)
    over_data = partial(_over_data, module, layout, mesh, blocks, policy, device, tensor, training, patches)
    if cut is None:
        return over_data()
    assert mesh is not None
    assert pipeline_options is not None
    assert isinstance(module, pl.LightningModule)
    pipelined = Pipelined(module, cut, pipeline_options, mesh.root["pp"].get_group(), device)
    if layout.dp_shard > 1:
        pipelined.run_in(over_data(one_backward=True))
    else:
        data_group = mesh.data.get_group() if layout.num_data_ranks > 1 else None
        pipelined.run_in(SingleProcessRunner(module, tensor), data_group)
    return pipelined


def _divide(module: nn.Module, division: Division, mesh: ParallelMesh | None) -> TensorAxis:
    assert mesh is not None
    division = _held_division(module, division)
    split(module, division.plan, mesh.root["tp"], division.loss_parallel, division.chains)
    return TensorAxis(module, partial_parameters(module, division), mesh.root["tp"])


def _is_held(module: nn.Module) -> bool:
    """Whether this rank's stages have it; no stage has a part of a block."""
    return not any(is_placeholder(p) for p in module.parameters())


def _held_division(module: nn.Module, division: Division) -> Division:
    """What this rank's stages have of it."""
    plan = {name: part for name, part in division.plan.items() if _is_held(module.get_submodule(name))}
    chains = [[name for name in chain if _is_held(module.get_submodule(name))] for chain in division.chains]
    return Division(plan, [chain for chain in chains if chain], division.loss_parallel)


def _over_data(
    module: nn.Module,
    layout: Layout,
    mesh: ParallelMesh | None,
    blocks: dict[str, nn.Module],
    policy: MixedPrecisionPolicy,
    device: torch.device,
    tensor: TensorAxis | None,
    training: bool,
    patches: Patches,
    one_backward: bool = False,
) -> SingleProcessRunner:
    if mesh is None or layout.num_data_ranks == 1:
        return SingleProcessRunner(module, tensor)
    if layout.holds_shards:  # DDP holds no DTensors: beside the tensor axis, copies are made by fully_shard too
        axes = ("dp_replicate", "dp_shard") if layout.dp_replicate > 1 else ("dp_shard",)
        group = mesh.data.get_group()
        return FSDPRunner(module, mesh.root[axes], blocks, policy, group, patches, tensor, one_backward)
    return DDPRunner(module, mesh.data.get_group(), device) if training else SingleProcessRunner(module)


def _compile(module: nn.Module, blocks: dict[str, nn.Module], options: dict[str, Any], patches: Patches) -> None:
    """Compiles the blocks in place; a network without blocks as a whole. State-dict names stay."""
    targets = list(blocks.values()) or [child for child in module.children() if any(True for _ in child.parameters())]
    for target in targets:
        # fully_shard's hooks have to lie outside of what is compiled: only a module it has not seen is
        if compiled_call(target) is None and not isinstance(target, FSDPModule):
            target.compile(**options)
            patches.also(partial(vars(target).pop, COMPILED_CALL, None))
