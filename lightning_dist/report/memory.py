"""What a rank holds at its peak, and for what: told before a run, and beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Column, Table

from lightning_dist.report.sharding_plan import size_in_words

WIDTH = 30
"""Characters of the longest bar."""


@dataclass(frozen=True)
class MemoryPeak:
    """Bytes at a peak, and what they were held for."""

    total: int
    parts: dict[str, int]


@dataclass(frozen=True)
class MemoryReport:
    """Peaks of the ranks that hold most of each stage; of a layout without stages, of the first rank.

    Args:
        ranks: by rank, its peaks by when they are reached: in the set-up, in the first step, in later ones.
        measured: what a rank held more at its peak than before the run, in bytes; None where nothing was run.
    """

    ranks: dict[int, dict[str, MemoryPeak]]
    measured: int | None = None

    @property
    def largest(self) -> tuple[int, str, MemoryPeak]:
        """The rank with most, when, and its peak."""
        peaks = ((rank, when, peak) for rank, by_time in self.ranks.items() for when, peak in by_time.items())
        return max(peaks, key=lambda found: found[2].total)

    def table(self) -> Table:
        """The report as a rich table."""
        rank, when, peak = self.largest
        title = f"peak memory: {size_in_words(peak.total)} on rank {rank}, {when}"
        table = Table("held for", Column("bytes", justify="right"), "", title=title, title_justify="left")
        for part, size in peak.parts.items():
            if size:
                table.add_row(part, *_cells(size, peak.total))
        table.add_section()
        for time, other in self.ranks[rank].items():
            table.add_row(f"peak: {time}", *_cells(other.total, peak.total))
        if len(self.ranks) > 1:
            table.add_section()
            for number, by_time in self.ranks.items():
                table.add_row(f"peak of rank {number}", *_cells(max(p.total for p in by_time.values()), peak.total))
        if self.measured is not None:
            table.add_section()
            table.add_row("measured", *_cells(self.measured, peak.total))
        return table

    def print(self) -> None:
        """Prints the table."""
        Console().print(self.table())


def _cells(size: int, whole: int) -> tuple[str, str]:
    return size_in_words(size), "█" * max(1, round(WIDTH * size / max(whole, 1)))
