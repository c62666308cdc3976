"""What a verification found: for a table to read, and plain data for machines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightning_dist.verify.comparison import Values
from lightning_dist.verify.departure import Departure

FORMAT = 1
"""Of the file; another number where a field changes its meaning."""

Status = Literal["same", "differs", "refused", "failed"]

_STYLES = {"same": "green", "differs": "bold red", "refused": "yellow", "failed": "bold red"}


@dataclass(frozen=True)
class LayoutResult:
    """Of one layout.

    Args:
        layout: as it was asked for.
        status: ``"refused"`` where the layout, or the comparison, can't be, in a sentence; ``"failed"`` where a rank
            raised, died or gave no answer.
        sentence: what was found.
        num_data_ranks: whose batches one process got joined; 0 where it did not come to that.
        differences: the largest relative one, by kind.
        values: side by side.
        departure: the first that differs.
        trace: of a rank that failed.
        seconds: wall time.
    """

    layout: str
    status: Status
    sentence: str
    num_data_ranks: int = 0
    differences: dict[str, float] = field(default_factory=dict)
    values: Values = field(default_factory=dict)
    departure: Departure | None = None
    trace: str = ""
    seconds: float = 0.0


@dataclass
class Verification:
    """Of a module.

    Args:
        steps: of the optimizer, in each training.
        precision: of the Trainer.
        tolerance: relative difference of numbers that is rounding.
        notes: what the comparison did, or has to be read with; a sentence each.
        results: by layout, in the order in which they were asked for.
        validation_batches: of one process, of all loaders; 0 where there was no validation.
    """

    steps: int
    precision: str
    tolerance: float
    notes: list[str]
    results: list[LayoutResult] = field(default_factory=list)
    validation_batches: int = 0

    def __getitem__(self, layout: str) -> LayoutResult:
        """The result of a layout, as it was asked for; a KeyError for another."""
        return {result.layout: result for result in self.results}[layout]

    @property
    def is_same(self) -> bool:
        """Whether no layout differs or fails; one that is refused has no other numbers."""
        return not any(result.status in ("differs", "failed") for result in self.results)

    @property
    def is_refused(self) -> bool:
        """Whether a layout is refused."""
        return any(result.status == "refused" for result in self.results)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"format": FORMAT, **_plain(asdict(self))}

    def table(self) -> RenderableType:
        """A line a layout, and what was found of those that are not the same; the numbers side by side; notes."""
        parts: list[RenderableType] = [self._verdicts(), *self._side_by_side()]
        return Group(*parts, *(Text(f"note: {note}") for note in self.notes))

    def _verdicts(self) -> Table:
        validated = f" and {self.validation_batches} validation batches" if self.validation_batches else ""
        title = f"{self.steps} steps{validated} beside one process, {self.precision}; rounding is {self.tolerance:.0e}"
        table = Table(title=title, title_justify="left")
        table.add_column("layout", no_wrap=True)
        table.add_column("")
        kinds = [kind for kind in _KINDS if kind in _ALWAYS or any(kind in r.differences for r in self.results)]
        for kind in kinds:
            table.add_column(kind, justify="right")
        table.add_column("what was found", overflow="fold", ratio=1)
        table.add_column("s", justify="right")
        for result in self.results:
            away = (f"{result.differences[k]:.0e}" if k in result.differences else "" for k in kinds)
            status = f"[{_STYLES[result.status]}]{result.status}[/]"
            told = "" if result.status == "same" else escape(result.sentence)
            table.add_row(escape(result.layout), status, *away, told, f"{result.seconds:.1f}")
        return table

    def _side_by_side(self) -> Iterator[Table]:
        """A table for each number of data ranks, since those have batches of their own."""
        for ranks in sorted({result.num_data_ranks for result in self.results if result.values}):
            of = [result for result in self.results if result.num_data_ranks == ranks and result.values]
            whose = "the batches of one process" if ranks == 1 else f"the batches of {ranks} data ranks, joined"
            table = Table("", "one process", *(escape(r.layout) for r in of), title=whose, title_justify="left")
            for name in dict.fromkeys(name for result in of for name in result.values):
                one = next(result.values[name][1] for result in of if name in result.values)
                mine = (f"{r.values[name][0]:.8g}" if name in r.values else "" for r in of)
                table.add_row(escape(name), f"{one:.8g}", *mine)
            yield table


_ALWAYS = ("loss", "gradient norm", "weights", "logged values")
_KINDS = ("loss", "gradient norm", "weights", "buffers", "logged values", "validation")


def _plain(value: Any) -> Any:
    """Numbers that JSON has no word for, as strings."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
