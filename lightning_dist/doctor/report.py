"""What an examination found: a table to read, and a file to attach to a report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lightning_dist.doctor.results import CheckResult
from lightning_dist.doctor.scrub import scrub

FORMAT = 1
"""Of the file; another number where a field changes its meaning."""

_STYLES = {"ok": "green", "failed": "bold red", "skipped": "yellow"}


@dataclass
class Report:
    """Results in the order in which they came.

    Args:
        num_ranks: of the examination.
        device_type: of its ranks.
        num_checks: that are to run.
        results: a line each.
    """

    num_ranks: int
    device_type: str
    num_checks: int
    results: list[CheckResult] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        """Whether nothing failed."""
        return all(result.status != "failed" for result in self.results)

    @property
    def status(self) -> str:
        """``"ok"``, ``"failed"``, or ``"unfinished"`` where checks did not run and none failed."""
        if not self.is_ok:
            return "failed"
        return "ok" if len(self.results) == self.num_checks else "unfinished"

    def as_dict(self) -> dict[str, Any]:
        """Plain data without private things, see :func:`~lightning_dist.doctor.scrub.scrub`."""
        return {
            "format": FORMAT,
            "status": self.status,
            "ranks": self.num_ranks,
            "device": self.device_type,
            "checks": [scrub(result.as_dict()) for result in self.results],
        }

    def write(self, path: Path) -> None:
        """Writes the file, as JSON."""
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n")

    def table(self) -> Table:
        """A line per check."""
        table = Table(title=f"{self.num_ranks} ranks on {self.device_type}", title_justify="left")
        table.add_column("check", no_wrap=True)
        table.add_column("")
        table.add_column("what was found", overflow="fold")
        table.add_column("s", justify="right")
        for result in self.results:
            status = f"[{_STYLES[result.status]}]{result.status}[/]"
            table.add_row(escape(result.name), status, escape(result.reason), f"{result.seconds:.1f}")
        return table

    def rates(self) -> Table | None:
        """Latency and bandwidth of each collective, a column for each kind of group; None where none was measured.

        Bandwidth is of the bytes that a rank has, and in parentheses of the links, as nccl-tests count.
        """
        measured = {
            result.name.partition(" ")[2]: result.details["rates"] for result in self.results if _has_rates(result)
        }
        if not measured:
            return None
        table = Table("collective", *measured, title="us with 1 KiB; GB/s (of the links)", title_justify="left")
        cells: dict[str, dict[str, str]] = {}
        for groups, rates in measured.items():
            for rate in rates:
                told = f"{rate['latency_us']:.0f}; {rate['gb_per_s']:.2f} ({rate['bus_gb_per_s']:.2f})"
                cells.setdefault(rate["collective"], {})[groups] = told
        for collective, of_groups in cells.items():
            table.add_row(collective, *(of_groups.get(groups, "not supported") for groups in measured))
        return table


def _has_rates(result: CheckResult) -> bool:
    return bool(result.details.get("rates"))
