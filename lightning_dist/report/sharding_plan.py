"""What the tensor axis divides of a module, and what every rank of it keeps whole."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

from rich.table import Column, Table
from torch import Tensor, nn

from lightning_dist.layout import Layout
from lightning_dist.plans.tensor import ModulePlan, ShardingPlan, Split, parameter_splits

MOST_ROWS = 12  # for what stays whole; the smallest share the last one


@dataclass(frozen=True)
class Row:
    """Modules that are divided alike, ``*`` for numbers in their name; sums of all, bytes on the rank with most."""

    name: str
    count: int
    split: str
    num_parameters: int
    rank_bytes: int


@dataclass(frozen=True)
class ShardingPlanReport:
    """The sharding plan of a module over the tensor axis.

    Args:
        tp: degree of the axis.
        divided: what is, in the order of the module.
        whole: what every rank of the axis holds, the largest first.
        sequence_blocks: names of the blocks between which positions are divided, with ``*`` for their numbers.
        loss_parallel: whether logits stay divided.
    """

    tp: int
    divided: list[Row]
    whole: list[Row]
    sequence_blocks: list[str]
    loss_parallel: bool

    @classmethod
    def of(cls, module: nn.Module, sharding_plan: ShardingPlan, layout: Layout) -> ShardingPlanReport:
        """The report of a module, divided already or not, whose parameters have their whole shapes."""
        parameters = dict(module.named_parameters())
        splits = parameter_splits(sharding_plan.tensor_plan)
        divided = [
            _row(name, _in_words(part), {n: parameters[n] for n in own if n in parameters}, splits, layout)
            for name, part in sharding_plan.tensor_plan.items()
            if (own := parameter_splits({name: part}))
        ]
        others: dict[str, dict[str, Tensor]] = {}
        for name, parameter in parameters.items():
            if name not in splits:
                others.setdefault(name.rpartition(".")[0], {})[name] = parameter
        whole = [_row(name, "whole", own, splits, layout) for name, own in others.items()]
        return cls(
            tp=layout.tp,
            divided=_merged(divided),
            whole=sorted(_merged(whole), key=lambda row: -row.rank_bytes),
            sequence_blocks=list(dict.fromkeys(map(_starred, itertools.chain(*sharding_plan.sequence_blocks)))),
            loss_parallel=sharding_plan.loss_parallel,
        )

    def table(self) -> Table:
        """The report as a rich table."""
        numbers = [Column(name, justify="right") for name in ("count", "parameters", "on this rank")]
        table = Table(Column("module", overflow="fold"), *numbers, "how", title=f"tp={self.tp}", title_justify="left")
        for row in self.divided:
            table.add_row(*_cells(row), row.split)
        table.add_section()
        for row in self.whole[:MOST_ROWS]:
            table.add_row(*_cells(row), "whole on every rank")
        if rest := self.whole[MOST_ROWS:]:
            table.add_row(*_cells(_row_of_all(f"{len(rest)} more", rest)), "whole on every rank")
        if self.sequence_blocks or self.loss_parallel:
            table.add_section()
        if self.sequence_blocks:
            table.add_row(", ".join(self.sequence_blocks), "", "", "", "positions divided between them")
        if self.loss_parallel:
            table.add_row("logits", "", "", "", "divided by vocabulary until something looks at them")
        return table


def rank_bytes(parameter: Tensor, split: Split | None, layout: Layout) -> int:
    """Bytes of a parameter of its whole shape on the rank that holds most, split over the tensor axis or not."""
    sizes = list(parameter.shape)
    if split is not None:
        sizes[split.dim] = math.ceil(sizes[split.dim] / split.packed / layout.tp) * split.packed
    if sizes:  # fully_shard divides what the tensor axis left along the first dim
        sizes[0] = math.ceil(sizes[0] / layout.dp_shard)
    return math.prod(sizes) * parameter.element_size()


def size_in_words(num_bytes: int) -> str:
    """As people read it."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def _in_words(part: ModulePlan) -> str:
    """Such as ``by heads: q_proj, k_proj, v_proj; o_proj by its inputs``."""
    columns = list(dict.fromkeys(name.rpartition(".")[0] for name in part.parameters if "." in name))
    columns = [name for name in columns if name not in part.rows]
    words = part.split + (f": {', '.join(columns)}" if columns else "")
    rows = [row for row in part.rows if row]
    return words + (f"; {', '.join(rows)} by its inputs" if rows and columns else "")


def _row(name: str, split: str, own: dict[str, Tensor], splits: dict[str, Split], layout: Layout) -> Row:
    held = sum(rank_bytes(parameter, splits.get(n), layout) for n, parameter in own.items())
    return Row(_starred(name), 1, split, sum(parameter.numel() for parameter in own.values()), held)


def _merged(rows: list[Row]) -> list[Row]:
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        alike.setdefault((row.name, row.split), []).append(row)
    return [_row_of_all(name, same) for (name, _), same in alike.items()]


def _row_of_all(name: str, rows: list[Row]) -> Row:
    numbers = (sum(getattr(row, what) for row in rows) for what in ("num_parameters", "rank_bytes"))
    return Row(name, sum(row.count for row in rows), rows[0].split, *numbers)


def _starred(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) or "the module itself"


def _cells(row: Row) -> tuple[str, str, str, str]:
    return row.name, str(row.count), f"{row.num_parameters:,}", size_in_words(row.rank_bytes)
