"""What a layout would do to a module, without training, without other processes, and without memory for its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_dist.initialization import CannotDefer, record_initialization
from lightning_dist.layout import Layout
from lightning_dist.parallel import Checkpointing, validate_blocks
from lightning_dist.parallel.fsdp_units import shard_units
from lightning_dist.parallel.pipeline import PipelineOptions, Stages, plan_stages
from lightning_dist.parallel.shard_options import ShardOptions, large_layers, parts_of_blocks
from lightning_dist.plans.tensor import ShardingPlan, TensorOptions, parameter_splits
from lightning_dist.ranks import choose_layout
from lightning_dist.report import LayoutReport, PipelineReport, ShardingPlanReport
from lightning_dist.report.sharding_plan import rank_bytes


def build_deferred(make: Callable[[], pl.LightningModule]) -> pl.LightningModule:
    """Makes a module and its network: parameters on meta where that can be, buffers with their values."""

    def build() -> pl.LightningModule:
        module = make()
        if is_overridden("configure_model", module):
            module.configure_model()
        return module

    try:
        with record_initialization() as recorded:
            module = build()
        if any(buffer.is_meta for buffer in module.buffers()):
            recorded.bind(module)
            recorded.materialize(module, parameters=False)  # a pipeline is cut by running it, with buffers for real
        return module
    except CannotDefer:
        return build()


def plan_report(
    module: pl.LightningModule,
    num_ranks: int,
    layout: Layout | None,
    blocks: dict[str, nn.Module],
    tensor: TensorOptions,
    pipeline: PipelineOptions,
    keep_whole: Callable[[Layout], bool],
    checkpointing: Checkpointing = "none",
    batch: Any = None,
    shards: ShardOptions | None = None,
) -> LayoutReport:
    """The report of a module that stays as it is, for the rank that holds most of it; a ValueError as a fit would
    raise.

    Args:
        module: with its network, on any device or on meta.
        num_ranks: of the whole run.
        layout: resolved; None to choose one by the module's size.
        blocks: its repeated blocks, by name.
        tensor: what the user asked of the tensor axis.
        pipeline: what the user asked of the pipeline.
        keep_whole: whether a layout leaves no block to be cut inside.
        checkpointing: how much of the activations is computed again in backward.
        batch: for its training step, which cuts a pipeline; None to run its forward on ``example_input_array``.
        shards: what the user asked of the shard axis.
    """
    reason = ""
    if layout is None:
        layout, reason = choose_layout(module, num_ranks, torch.device("cpu"), num_ranks)
    validate_blocks(module, blocks, checkpointing)
    stages = None
    if layout.pp > 1:
        pipeline.validate(layout.pp)
        stages = plan_stages(module, pipeline, layout.pp, list(blocks), keep_whole(layout), batch)
    sharding_plan = tensor.sharding_plan(module, layout.tp, blocks)
    return LayoutReport.of(
        module,
        layout,
        reason=reason,
        units=_units(module, layout, blocks, sharding_plan, shards),
        recomputed=list(blocks) if checkpointing != "none" else [],
        checkpointing=checkpointing,
        rank_bytes=_most_bytes(module, layout, sharding_plan, stages),
        sharding_plan=None if sharding_plan is None else ShardingPlanReport.of(module, sharding_plan, layout),
        pipeline=None if stages is None else PipelineReport.of(module, stages, pipeline),
    )


def _units(
    module: nn.Module,
    layout: Layout,
    blocks: dict[str, nn.Module],
    sharding_plan: ShardingPlan | None,
    shards: ShardOptions | None,
) -> list[str]:
    """Names of the modules that are sharded one by one."""
    if not layout.holds_parts_of_blocks or layout.num_data_ranks == 1:
        return []
    shards = ShardOptions() if shards is None else shards
    beside = large_layers(module, blocks) if shards.large_layers else {}
    layers = shard_units(module, {**parts_of_blocks(blocks, shards.max_unit_parameters), **beside})
    divided = {} if sharding_plan is None else sharding_plan.tensor_plan
    inside = tuple(f"{name}." for name, part in divided.items() if part.columns)  # which are not divided further
    return [*blocks, *(name for name in layers if name not in divided and not name.startswith(inside))]


def _most_bytes(module: nn.Module, layout: Layout, sharding_plan: ShardingPlan | None, stages: Stages | None) -> int:
    """Bytes of parameters on the rank that holds most."""
    splits = {} if sharding_plan is None else parameter_splits(sharding_plan.tensor_plan)
    held = {name: rank_bytes(p, splits.get(name), layout) for name, p in module.named_parameters()}
    if stages is None:
        return sum(held.values())
    return max(sum(b for name, b in held.items() if rank in stages.holders(name)) for rank in range(layout.pp))
