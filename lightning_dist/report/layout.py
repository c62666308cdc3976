"""The layout, and what a rank holds of the module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_dist.dtensors import local_part
from lightning_dist.layout import MESH_AXES, Layout
from lightning_dist.placeholder import is_placeholder
from lightning_dist.report.pipeline import PipelineReport
from lightning_dist.report.sharding_plan import ShardingPlanReport, size_in_words

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
        num_parameters: of the whole module.
        whole_bytes: of the whole module's parameters.
        rank_bytes: of what this rank keeps of them between steps.
        reason: why ``"auto"`` chose the layout; empty where the user did.
        units: names of the modules that are sharded one by one.
        recomputed: names of the modules that compute their forward again in backward.
        checkpointing: how much of it: ``"full"`` or ``"selective"``; ``"none"``.
        sharding_plan: what the tensor axis divides; None without it.
        pipeline: the stages; None without that axis.
    """

    layout: Layout
    num_parameters: int
    whole_bytes: int
    rank_bytes: int
    reason: str = ""
    units: list[str] = field(default_factory=list)
    recomputed: list[str] = field(default_factory=list)
    checkpointing: str = "none"
    sharding_plan: ShardingPlanReport | None = None
    pipeline: PipelineReport | None = None

    @classmethod
    def of(cls, module: nn.Module, layout: Layout, rank_bytes: int | None = None, **more: Any) -> LayoutReport:
        """The report of a module, set up or not.

        Args:
            module: with parameters of their whole shapes.
            layout: resolved.
            rank_bytes: what a rank will keep of the parameters; default: what they take on this one.
            more: of the report's other arguments.
        """
        parameters = list(module.parameters())
        return cls(
            layout=layout,
            num_parameters=sum(p.numel() for p in parameters),
            whole_bytes=sum(p.numel() * p.element_size() for p in parameters),
            rank_bytes=sum(map(_local_bytes, parameters)) if rank_bytes is None else rank_bytes,
            **more,
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
