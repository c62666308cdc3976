"""The layout, and what a rank holds of the module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_dist.dtensors import local_part
from lightning_dist.layout import MESH_AXES, Layout
from lightning_dist.parallel.pipeline import Stages
from lightning_dist.placeholder import is_placeholder
from lightning_dist.plans.tensor import ShardingPlan, parameter_splits
from lightning_dist.report.pipeline import PipelineReport
from lightning_dist.report.sharding_plan import ShardingPlanReport, rank_bytes, size_in_words

if TYPE_CHECKING:
    from lightning_dist.strategy import HybridStrategy

MEANING = {
    "pp": "stages of the network",
    "dp_replicate": "copies with different samples",
    "dp_shard": "shards of the states, different samples",
    "cp": "parts of a sequence",
    "tp": "parts of a layer",
}


@dataclass(frozen=True)
class LayoutReport:
    """The layout and what a rank holds of the module.

    Args:
        layout: resolved.
        reason: why ``"auto"`` chose it; empty where the user did.
        units: names of the modules that are sharded one by one.
        recomputed: names of the modules that compute their forward again in backward.
        checkpointing: how much of it: ``"full"`` or ``"selective"``; ``"none"``.
        num_parameters: of the whole module.
        whole_bytes: of the whole module's parameters.
        rank_bytes: of what this rank keeps of them between steps.
        sharding_plan: what the tensor axis divides; None without it.
        pipeline: the stages; None without that axis.
    """

    layout: Layout
    reason: str
    units: list[str]
    recomputed: list[str]
    checkpointing: str
    num_parameters: int
    whole_bytes: int
    rank_bytes: int
    sharding_plan: ShardingPlanReport | None = None
    pipeline: PipelineReport | None = None

    @classmethod
    def of(cls, strategy: HybridStrategy) -> LayoutReport:
        """The report of a strategy that has set up its module."""
        module, layout = strategy.lightning_module, strategy.layout
        assert module is not None
        assert layout is not None
        parameters = list(module.parameters())
        return cls(
            layout=layout,
            reason=strategy.sharding_reason,
            units=strategy.sharded_units,
            recomputed=strategy.recomputed_blocks,
            checkpointing=strategy.activation_checkpointing,
            num_parameters=sum(p.numel() for p in parameters),
            whole_bytes=sum(p.numel() * p.element_size() for p in parameters),
            rank_bytes=sum(_local_bytes(p) for p in parameters),
            sharding_plan=None
            if strategy.sharding_plan is None
            else ShardingPlanReport.of(module, strategy.sharding_plan, layout),
            pipeline=strategy.pipeline_report(),
        )

    @classmethod
    def planned(
        cls,
        module: nn.Module,
        layout: Layout,
        sharding_plan: ShardingPlan | None,
        units: list[str],
        stages: Stages | None = None,
        **more: Any,
    ) -> LayoutReport:
        """The report of a module that was not set up: on any device or on meta. Of the rank that holds most.

        Args:
            module: whole.
            layout: resolved.
            sharding_plan: what the tensor axis will do to it.
            units: names of the modules that will be sharded one by one.
            stages: into which it will be cut; None without a pipeline.
            more: of the report's other arguments.
        """
        parameters = dict(module.named_parameters())
        splits = {} if sharding_plan is None else parameter_splits(sharding_plan.tensor_plan)
        held = {n: rank_bytes(p, splits.get(n), layout) for n, p in parameters.items()}
        most = sum(held.values())
        if stages is not None:
            most = max(sum(b for n, b in held.items() if rank in stages.holders(n)) for rank in range(layout.pp))
        return cls(
            layout=layout,
            units=units if layout.holds_parts_of_blocks and layout.num_data_ranks > 1 else [],
            num_parameters=sum(p.numel() for p in parameters.values()),
            whole_bytes=sum(p.numel() * p.element_size() for p in parameters.values()),
            rank_bytes=most,
            sharding_plan=None if sharding_plan is None else ShardingPlanReport.of(module, sharding_plan, layout),
            **{"reason": "", "recomputed": [], "checkpointing": "none", **more},
        )

    def table(self) -> Table:
        """The report as a rich table."""
        table = Table(title="lightning_dist", title_justify="left")
        table.add_column("axis")
        table.add_column("degree", justify="right")
        table.add_column("what it splits")
        for axis in MESH_AXES:
            if (degree := getattr(self.layout, axis)) > 1:
                table.add_row(axis, str(degree), MEANING[axis])
        if self.layout.world_size == 1:
            table.add_row("one process", "1", "nothing")
        table.add_section()
        table.add_row("parameters", f"{self.num_parameters:,}", f"{size_in_words(self.whole_bytes)} in all")
        share = self.rank_bytes / max(self.whole_bytes, 1)
        table.add_row("on this rank", size_in_words(self.rank_bytes), f"{share:.1%} of the parameters")
        if self.units:
            table.add_row("sharded units", str(len(self.units)), _shorten(self.units))
        if self.recomputed:
            what = f"{self.checkpointing}: {_shorten(self.recomputed)}"
            table.add_row("recomputed in backward", str(len(self.recomputed)), what)
        if self.reason:
            table.add_row("auto", "", self.reason)
        return table

    def show(self, trainer: pl.Trainer) -> None:
        """Prints the table on rank 0, once a fit; not where the Trainer was asked for no summary."""
        quiet = not any(type(c).__name__.endswith("ModelSummary") for c in trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.is_global_zero and trainer.training and not quiet:
            self.print()

    def print(self) -> None:
        """Prints the tables."""
        console = Console()
        console.print(self.table())
        if self.pipeline is not None:
            console.print(self.pipeline.table())
        if self.sharding_plan is not None:
            console.print(self.sharding_plan.table())


def _local_bytes(parameter: Tensor) -> int:
    if is_placeholder(parameter):
        return 0
    return local_part(parameter).nbytes


def _shorten(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... {names[-1]}"
