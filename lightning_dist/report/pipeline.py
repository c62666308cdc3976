"""The stages of a pipeline: where the network is cut, what each costs, and how long a rank waits."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table
from torch import Tensor, nn

from lightning_dist.parallel.pipeline import PipelineOptions, Stages
from lightning_dist.report.sharding_plan import size_in_words


@dataclass(frozen=True)
class StageRow:
    """A stage.

    Args:
        rank: of the pipeline, that runs it.
        begins: after which module; empty for the first.
        cost: its share of the whole step's.
        num_parameters: that it uses.
        sent: bytes that it sends on, per microbatch.
    """

    rank: int
    begins: str
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
        table = Table(title=f"pp={len({row.rank for row in self.rows})}, {self.schedule}", title_justify="left")
        for column in ("stage", "rank"):
            table.add_column(column, justify="right")
        table.add_column("begins after", overflow="fold")
        for column in ("cost", "parameters", "sends on"):
            table.add_column(column, justify="right")
        for stage, row in enumerate(self.rows):
            sent = size_in_words(row.sent) if row.sent else ""
            table.add_row(
                str(stage), str(row.rank), row.begins or "the input", f"{row.cost:.1%}", f"{row.num_parameters:,}", sent
            )
        table.add_section()
        equal = f"; {self.equal_balance:.2f} if modules were dealt by number" if self.equal_balance else ""
        table.add_row("", "", f"dearest stage over the mean: {self.balance:.2f}{equal}", "", "", "")
        waits = f"a rank waits for {self.bubble:.0%} of a step, if stages are equal"
        table.add_row("", "", f"{self.num_microbatches} microbatches: {waits}", "", "", "")
        return table


def _over_mean(costs: tuple[float, ...]) -> float:
    return max(costs) * len(costs) / sum(costs) if costs and sum(costs) else 0.0
