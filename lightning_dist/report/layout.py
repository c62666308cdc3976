"""The layout, what a rank holds of the module, and the stages of a pipeline: what each costs, how long ranks wait."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

from lightning_dist.dtensors import local_part
from lightning_dist.layout import MESH_AXES, Layout
from lightning_dist.parallel.pipeline import PipelineOptions, Stages
from lightning_dist.placeholder import held
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
        """The report of a module, set up or not, whose parameters have their whole shapes.

        Args:
            rank_bytes: what a rank will keep of the parameters; default: what they take on this one.
            more: of the report's other arguments.
        """
        parameters = list(module.parameters())
        if rank_bytes is None:
            rank_bytes = sum(local_part(parameter).nbytes for parameter in held(parameters))
        return cls(
            layout=layout,
            num_parameters=sum(p.numel() for p in parameters),
            whole_bytes=sum(p.numel() * p.element_size() for p in parameters),
            rank_bytes=rank_bytes,
            **more,
        )

    def table(self) -> Table:
        """The report as a rich table."""
        columns = "axis", Column("degree", justify="right"), "what it splits"
        table = Table(*columns, title="lightning_dist", title_justify="left")
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
        reports: list[Any] = [self, self.pipeline, self.sharding_plan]
        for report in reports:
            if report is not None:
                console.print(report.table())


def _shorten(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... {names[-1]}"


@dataclass(frozen=True)
class StageRow:
    """A stage: after which module it begins, its share of the costs, the bytes that it sends on per microbatch."""

    rank: int
    begins: str  # empty for the first
    cost: float
    num_parameters: int
    sent: int


@dataclass(frozen=True)
class PipelineReport:
    """The stages of a module.

    Args:
        schedule: its name.
        num_microbatches: of a batch that has enough samples.
        rows: the stages, in their order.
        balance: cost of the dearest stage over their mean.
        equal_balance: the same if cut points were dealt by their number.
        bubble: expected share of a step in which a rank waits.
    """

    schedule: str
    num_microbatches: int
    rows: list[StageRow]
    balance: float
    equal_balance: float
    bubble: float

    @classmethod
    def of(cls, module: nn.Module, stages: Stages, options: PipelineOptions) -> PipelineReport:
        """The report of a module, cut already or not."""
        parameters: dict[str, Tensor] = dict(module.named_parameters())
        number = options.num_microbatches or 4 * stages.num_ranks
        total = sum(stages.costs) or 1.0
        rows = [
            StageRow(
                rank=stages.schedule.rank_of(stage, stages.num_ranks),
                begins=stages.cuts[stage - 1] if stage else "",
                cost=stages.costs[stage] / total,
                num_parameters=sum(parameters[n].numel() for n, owners in stages.owners.items() if stage in owners),
                sent=stages.sent[stage] if stage < len(stages.cuts) else 0,
            )
            for stage in range(stages.num_stages)
        ]
        return cls(
            schedule=stages.schedule.name,
            num_microbatches=number,
            rows=rows,
            balance=_over_mean(stages.costs),
            equal_balance=_over_mean(stages.equal_costs),
            bubble=stages.schedule.bubble(number, stages.num_ranks),
        )

    def table(self) -> Table:
        """The report as a rich table."""
        names = "stage", "rank", "cost", "parameters", "sends on"
        stage, rank, *others = [Column(name, justify="right") for name in names]
        title = f"pp={len({row.rank for row in self.rows})}, {self.schedule}"
        begins = Column("begins after", overflow="fold")
        table = Table(stage, rank, begins, *others, title=title, title_justify="left")
        for number, row in enumerate(self.rows):
            numbers = [f"{row.cost:.1%}", f"{row.num_parameters:,}", size_in_words(row.sent) if row.sent else ""]
            table.add_row(str(number), str(row.rank), row.begins or "the input", *numbers)
        table.add_section()
        equal = f"; {self.equal_balance:.2f} if modules were dealt by number" if self.equal_balance else ""
        table.add_row("", "", f"dearest stage over the mean: {self.balance:.2f}{equal}", "", "", "")
        waits = f"a rank waits for {self.bubble:.0%} of a step, if stages are equal"
        table.add_row("", "", f"{self.num_microbatches} microbatches: {waits}", "", "", "")
        return table


def _over_mean(costs: tuple[float, ...]) -> float:
    return max(costs) * len(costs) / sum(costs) if costs and sum(costs) else 0.0
