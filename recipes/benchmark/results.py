"""Lines of a benchmark: a table to read, JSON to keep, a picture to see."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table

COLOURS = {"reached": "green", "missed": "red", "unclear": "yellow", "": "white"}


@dataclass(frozen=True)
class Line:
    """One measurement: ours, a peer's, and what must be reached.

    Args:
        group: of the table that it belongs to.
        what: was measured.
        ours, peer: readable.
        ratios: ours / peer, by the name of the estimate; the verdict is that of all of them together.
        at_most: what a ratio must not pass; None where nothing is asked.
        data: all that was measured.
    """

    group: str
    what: str
    ours: str
    peer: str
    ratios: dict[str, float]
    at_most: float | None
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """``reached``, ``missed``, or ``unclear`` where the estimates do not agree; empty where nothing is asked."""
        if self.at_most is None:
            return ""
        kept = [ratio <= self.at_most for ratio in self.ratios.values()]
        return "reached" if all(kept) else "unclear" if any(kept) else "missed"


def timed(
    group: str,
    what: str,
    ours: Sequence[Sequence[float]],
    peer: Sequence[Sequence[float]],
    at_most: float | None = None,
) -> Line:
    """A line of two competitors that took turns.

    The ratio by minimum is that of the fastest steps; the ratio by median is the median over the rounds of the ratio
    of the two bursts of a round, each taken by its median step.

    Args:
        group, what, at_most: of the line.
        ours, peer: seconds by round and step, as :func:`~recipes.benchmark.interleaving.interleave` returns them.
    """
    pairs = [median(a) / median(b) for a, b in zip(ours, peer, strict=True)]
    all_ours, all_peer = ([s for burst in bursts for s in burst] for bursts in (ours, peer))
    return Line(
        group,
        what,
        _milliseconds(all_ours),
        _milliseconds(all_peer),
        {"minimum": min(all_ours) / min(all_peer), "median": median(pairs)},
        at_most,
        {"ours_seconds": ours, "peer_seconds": peer, "paired_ratios": pairs},
    )


def counted(group: str, what: str, ours: float, peer: float, at_most: float | None, unit: str = "") -> Line:
    """A line of two numbers that are exact."""
    ratio = ours / peer if peer else (1.0 if ours == peer else float("inf"))
    data = {"ours": ours, "peer": peer}
    return Line(group, what, f"{ours:,.0f}{unit}", f"{peer:,.0f}{unit}", {"exact": ratio}, at_most, data)


def _milliseconds(seconds: list[float]) -> str:
    scale, unit = (1e3, "ms") if median(seconds) < 1 else (1, "s")
    return f"{scale * min(seconds):.2f} / {scale * median(seconds):.2f} {unit}"


def machine() -> dict[str, Any]:
    """What a number of seconds depends on."""
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


class Record:
    """The lines of a benchmark so far: each is printed and written to ``NAME.json`` as soon as it is measured.

    The file is whole at any moment, and the lines are in it alone: copies of a record, in the ranks say, go on with it.

    Args:
        folder, name: of the file.
        about: what else the file tells; it has to be what JSON takes, or have a ``str``.
    """

    def __init__(self, folder: Path, name: str, about: dict[str, Any]) -> None:
        self.folder, self.name, self.about = folder, name, {"finished": False, **about}
        self._write([])

    @property
    def lines(self) -> list[Line]:
        """What was measured."""
        return lines_of(json.loads(self._file.read_text()))

    def extend(self, lines: Iterable[Line]) -> None:
        """Keeps and prints each line as it comes; among ranks the first one does."""
        for line in lines:
            if not dist.is_initialized() or dist.get_rank() == 0:
                self.add(line)

    def add(self, line: Line) -> None:
        """Keeps and prints a line."""
        self._write([*self.lines, line])
        text = escape(f"{line.group}: {line.what}: {line.ours} against {line.peer}, {ratio_in_words(line)}")
        _console().print(f"{text} [{COLOURS[line.verdict]}]{line.verdict}[/]", soft_wrap=True)

    def close(self, finished: bool) -> None:
        """Prints the lines as tables, and draws ``NAME.png`` where matplotlib is installed.

        Args:
            finished: all was measured; the file says so.
        """
        self.about |= {"finished": finished, "after": machine()}
        self._write(self.lines)
        show(self.lines)
        draw(self.lines, self.folder / f"{self.name}.png")

    def _write(self, lines: Sequence[Line]) -> None:
        rows = [{**asdict(line), "verdict": line.verdict} for line in lines]
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._file.with_suffix(".json.part")
        unfinished.write_text(json.dumps({**self.about, "lines": rows}, indent=1, default=str))
        unfinished.replace(self._file)

    @property
    def _file(self) -> Path:
        return self.folder / f"{self.name}.json"


def lines_of(content: dict[str, Any]) -> list[Line]:
    """Those of a record's file; none of an empty one."""
    rows = content.get("lines", [])
    return [Line(**{name: value for name, value in row.items() if name != "verdict"}) for row in rows]


def ratio_in_words(line: Line) -> str:
    """By each estimate."""
    return " / ".join(f"{ratio:.3f}" for ratio in line.ratios.values())


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=140, highlight=False)


def show(lines: Sequence[Line], console: Console | None = None) -> None:
    """Prints a table per group."""
    console = console or _console()
    for group in dict.fromkeys(line.group for line in lines):
        table = Table(title=group, title_justify="left")
        for name in ("what", "ours", "peer", "ratio", "must", "verdict"):
            table.add_column(name, justify="left" if name in ("what", "verdict") else "right")
        for line in lines:
            if line.group == group:
                must = "" if line.at_most is None else f"<= {line.at_most:g}"
                table.add_row(
                    line.what,
                    line.ours,
                    line.peer,
                    ratio_in_words(line),
                    must,
                    f"[{COLOURS[line.verdict]}]{line.verdict}",
                )
        console.print(table)


def draw(lines: Sequence[Line], file: Path) -> None:
    """Writes a picture of what was timed, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    _picture(lines, file)


def _picture(lines: Sequence[Line], file: Path) -> None:
    """The ratio of every round as a dot, the median and the minimum as marks, what must be reached as a line."""
    from matplotlib import pyplot

    timed_lines = [line for line in lines if "paired_ratios" in line.data]
    if not timed_lines:
        return
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.4 * len(timed_lines)), layout="constrained")
    for row, line in enumerate(timed_lines):
        pairs = line.data["paired_ratios"]
        axes.plot(pairs, [row] * len(pairs), ".", color="0.75", label=None if row else "a round")
        axes.plot(line.ratios["median"], row, "o", color="tab:blue", label=None if row else "median of the rounds")
        axes.plot(line.ratios["minimum"], row, "|", color="k", ms=12, label=None if row else "by fastest step")
        if line.at_most is not None:
            axes.plot([line.at_most] * 2, [row - 0.4, row + 0.4], color="tab:red", label=None if row else "must")
    axes.axvline(1, color="0.5", lw=0.5)
    axes.set_yticks(range(len(timed_lines)), [f"{line.group}: {line.what}" for line in timed_lines], fontsize=7)
    axes.set_xlim(0.8, 1.3)
    axes.invert_yaxis()
    axes.set_xlabel("ours / peer")
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
