"""What a layout would do to a module, without other processes and without training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_dist.layout import Layout
from lightning_dist.parallel import Checkpointing, validate_blocks
from lightning_dist.parallel.pipeline import PipelineOptions, Stages, plan_stages
from lightning_dist.plans.tensor import ShardingPlan, TensorOptions, parameter_splits
from lightning_dist.ranks import choose_layout
from lightning_dist.report import LayoutReport, PipelineReport, ShardingPlanReport
from lightning_dist.report.sharding_plan import rank_bytes


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
) -> LayoutReport:
    """The report of a module that stays as it is, for the rank that holds most of it.

    Args:
        module: with its network, on any device or on meta.
        num_ranks: of the whole run.
        layout: resolved; None to choose one by the module's size.
        blocks: its repeated blocks, by name.
        tensor: what the user asked of the tensor axis.
        pipeline: what the user asked of the pipeline.
        keep_whole: whether a layout leaves no block to be cut inside.
        checkpointing: how much of the activations is computed again in backward.
        batch: for its training step; a pipeline is cut by running it. None to run its forward on
            ``example_input_array``.

    Raises:
        ValueError: as a fit would.
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
        units=list(blocks) if layout.holds_parts_of_blocks and layout.num_data_ranks > 1 else [],
        recomputed=list(blocks) if checkpointing != "none" else [],
        checkpointing=checkpointing,
        rank_bytes=_most_bytes(module, layout, sharding_plan, stages),
        sharding_plan=None if sharding_plan is None else ShardingPlanReport.of(module, sharding_plan, layout),
        pipeline=None if stages is None else PipelineReport.of(module, stages, pipeline),
    )


def _most_bytes(module: nn.Module, layout: Layout, sharding_plan: ShardingPlan | None, stages: Stages | None) -> int:
    """Bytes of parameters on the rank that holds most."""
    splits = {} if sharding_plan is None else parameter_splits(sharding_plan.tensor_plan)
    held = {name: rank_bytes(p, splits.get(name), layout) for name, p in module.named_parameters()}
    if stages is None:
        return sum(held.values())
    return max(sum(b for name, b in held.items() if rank in stages.holders(name)) for rank in range(layout.pp))
