"""What a job logged while it ran: its metrics over steps, and over time."""

from __future__ import annotations

import contextlib
import csv
import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

NOT_SHOWN = ("epoch", "hp_metric")
"""Names that loggers add, and that tell nothing."""


class Point(NamedTuple):
    """A logged value.

    Attributes:
        step: optimizer steps that were done.
        seconds: that the job had run, those before it was gone on with included; None where the logger keeps no time.
        value: of the metric; not a number where it was none.
    """

    step: int
    seconds: float | None
    value: float


def read_curves(directory: Path) -> dict[str, list[Point]]:
    """The metrics that a job logged, by name, in the order of steps.

    TensorBoard's files tell when each value was logged, and the parts of a job that was gone on with; without them
    those of the CSV logger tell the steps.
    """
    return _of_tensorboard(directory) or _of_csv(directory)


def _of_tensorboard(directory: Path) -> dict[str, list[Point]]:
    files = [file for file in directory.rglob("events.out.tfevents.*") if ".hydra" not in file.parts]
    if not files:
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    parts = [EventAccumulator(str(file), {"scalars": 0}).Reload() for file in files]
    parts = [part for part in parts if part.Tags()["scalars"]]
    found: dict[str, dict[int, Point]] = defaultdict(dict)
    ran = 0.0  # seconds of the parts before
    for part in sorted(parts, key=lambda part: part.FirstEventTimestamp()):
        began = ended = part.FirstEventTimestamp()
        for name in part.Tags()["scalars"]:
            for event in part.Scalars(name):
                found[name][event.step] = Point(event.step, ran + event.wall_time - began, event.value)
                ended = max(ended, event.wall_time)
        ran += ended - began
    return _in_order(found)


def _of_csv(directory: Path) -> dict[str, list[Point]]:
    """What is no number is left out: others write files of this name too."""
    found: dict[str, dict[int, Point]] = defaultdict(dict)
    for file in filter(Path.is_file, directory.rglob("metrics.csv")):
        with file.open(newline="", encoding="utf-8", errors="replace") as lines, contextlib.suppress(csv.Error):
            for row in csv.DictReader(lines):
                step = _number(row.pop("step", None) or "0")
                if step is None or not math.isfinite(step):
                    continue
                for name, text in row.items():
                    if name and text and (value := _number(text)) is not None:
                        found[name][int(step)] = Point(int(step), None, value)
    return _in_order(found)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _in_order(found: dict[str, dict[int, Point]]) -> dict[str, list[Point]]:
    return {
        name: sorted(points.values(), key=lambda point: point.step)
        for name, points in found.items()
        if name not in NOT_SHOWN
    }


def thin_out(points: list[Point], most: int) -> list[Point]:
    """At most so many of the points, evenly spread, the first and the last among them."""
    if len(points) <= most:
        return points
    stride = (len(points) - 1) / (most - 1)
    return [points[round(index * stride)] for index in range(most)]


def is_curve(points: list[Point]) -> bool:
    """Whether there is a line to draw."""
    return sum(math.isfinite(point.value) for point in points) > 1
