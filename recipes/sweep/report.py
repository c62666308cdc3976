"""``report.html``: the jobs of one sweep or several on a page of one file, which needs no network.

The tables are there without scripts; charts are Plotly's, whose library the page holds. ``page/`` has the parts.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from recipes.sweep.curves import Point, is_curve, read_curves, thin_out
from recipes.sweep.importance import importance, is_number
from recipes.sweep.jobs import STATES, Job, Jobs, short_names
from recipes.sweep.table import digits, metrics_shown, replaced

PAGE = Path(__file__).parent / "page"

MOST_POINTS, MOST_NUMBERS = 400, 150_000
"""Points of a curve, and numbers of all curves together, beyond which they are thinned out: a page stays below 7 MB."""

MOST_CURVES = 30
"""Metrics to choose from."""


def write_report(jobs: Jobs, file: Path) -> None:
    """Writes the page.

    Raises:
        ImportError: Plotly is not installed; the message says how to get it.
    """
    try:
        from jinja2 import Environment, FileSystemLoader
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'lightning_dist[recipes]' brings what the page needs") from None
    environment = Environment(loader=FileSystemLoader(PAGE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"digits": digits, "quoted": shlex.quote}
    page = environment.get_template("report.html").render(
        jobs=jobs,
        states=STATES,
        names=short_names(jobs.keys),
        metrics=metrics_shown(jobs),
        labels={job: jobs.label(job) for job in jobs.all},
        colors=_colors(jobs),
        of_sweeps=[jobs.of(sweep) for sweep in jobs.sweeps] if len(jobs.sweeps) > 1 else [],
        importance=importance(jobs),
        now=datetime.now(),
        data=_script_safe(_data(jobs)),
        plotly=get_plotlyjs(),
        style=(PAGE / "report.css").read_text(),
        script=(PAGE / "report.js").read_text(),
    )
    with replaced(file) as new:
        new.write_text(page, encoding="utf-8")


STOPS = ((0, 109, 219), (0, 158, 140), (224, 146, 8), (214, 69, 65))
"""Colours from the best job to the worst, to be seen on light and on dark."""


def _colors(jobs: Jobs) -> dict[Job, str]:
    """By place; jobs without a value are grey."""
    measured = [job for job in jobs.ranked if jobs.value(job) is not None]
    colors = dict.fromkeys(jobs.all, "rgb(140,140,140)")
    for place, job in enumerate(measured):
        at = place / max(1, len(measured) - 1) * (len(STOPS) - 1)
        low = min(int(at), len(STOPS) - 2)
        mixed = (round(a + (b - a) * (at - low)) for a, b in zip(STOPS[low], STOPS[low + 1], strict=True))
        colors[job] = f"rgb({','.join(map(str, mixed))})"
    return colors


def _data(jobs: Jobs) -> dict[str, Any]:
    """What the charts are drawn from."""
    colors = _colors(jobs)
    curves = {job: read_curves(job.directory) for job in jobs.all}
    shown = _metrics_of_curves(jobs, curves)
    lines = sum(is_curve(of_job.get(name, [])) for of_job in curves.values() for name in shown)
    most = max(20, min(MOST_POINTS, MOST_NUMBERS // (3 * max(1, lines))))
    described = [
        {
            "id": index,
            "label": jobs.label(job),
            "color": colors[job],
            "sweep": jobs.sweeps.index(job.sweep),
            "given": {key: job.values.get(key, "") for key in jobs.keys},
            "value": jobs.value(job),
            "curves": {name: _numbers(thin_out(curves[job].get(name, []), most)) for name in shown},
        }
        for index, job in enumerate(jobs.ranked)
    ]
    metric = {"name": jobs.metric.name, "isMaximized": jobs.metric.is_maximized} if jobs.metric else None
    names = short_names(jobs.keys)
    axes = [_axis(key, names[key], [job.values.get(key, "") for job in jobs.all]) for key in jobs.keys]
    return {"jobs": described, "axes": axes, "metric": metric, "metrics": shown}


def _metrics_of_curves(jobs: Jobs, curves: Mapping[Job, Mapping[str, list[Point]]]) -> list[str]:
    """Those that some job has a line of: what the jobs are compared by, then losses, then the others."""
    names = {name for of_job in curves.values() for name, points in of_job.items() if is_curve(points)}
    first = jobs.metric.name if jobs.metric else None
    order = sorted(names, key=lambda name: (name != first, "loss" not in name, not name.startswith("val"), name))
    return order[:MOST_CURVES]


def _numbers(points: list[Point]) -> dict[str, list[float | None]]:
    """Columns; what is no number is a gap of the line."""
    return {
        "step": [point.step for point in points],
        "seconds": [None if point.seconds is None else round(point.seconds, 2) for point in points],
        "value": [float(f"{point.value:.5g}") if math.isfinite(point.value) else None for point in points],
    }


def _axis(key: str, name: str, values: list[str]) -> dict[str, Any]:
    """One of the parallel coordinates: an axis of numbers where all values are, else a place for each value."""
    if all(map(is_number, values)):
        numbers = [float(value) for value in values]
        is_log = min(numbers) > 0 and max(numbers) / min(numbers) >= 30
        return {"key": key, "name": name, "isLog": is_log, "choices": None}
    return {"key": key, "name": name, "isLog": False, "choices": sorted(set(values))}


def _script_safe(data: Any) -> str:
    """JSON within ``<script>``: nothing in it ends the element, or begins a comment."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")
