"""The jobs of a sweep as a table: in the terminal, and for other programs."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.sweep.jobs import Job, Jobs, short_names

LONGEST_NAME, LONGEST_VALUE = 20, 36
"""Characters in the terminal; of a longer one the middle is left out."""


def print_table(jobs: Jobs, console: Console) -> None:
    """A column for each key that differs, then what the jobs are compared by, the test's metrics as far as there is
    room, and seconds; best first. Below it the first error of each job that failed.
    """
    metrics = metrics_shown(jobs)
    table = _table(jobs, metrics)
    while (
        len(metrics) > 2
        and console.measure(table, options=console.options.update(max_width=1000)).maximum > console.width
    ):
        del metrics[-2]
        table = _table(jobs, metrics)
    console.print(table)
    for job in jobs.failed:
        console.print(f"job {jobs.label(job)}: {job.error}", markup=False, highlight=False, soft_wrap=True)


def _table(jobs: Jobs, metrics: list[str]) -> Table:
    names, by = short_names(jobs.keys), jobs.metric
    table = Table(title="Sweep" if by is None else f"Sweep, best {by.name} first ({by.direction})")
    table.add_column("job", justify="right", no_wrap=True)
    for key in jobs.keys:
        table.add_column(escape(_short(names[key], LONGEST_NAME)), overflow="fold")
    for metric in metrics:
        table.add_column(escape(metric.replace("/", "/\n")), justify="right", overflow="fold")
    if not metrics:
        table.add_column("state")
    for job in jobs.ranked:
        values = [escape(_short(job.values.get(key, ""), LONGEST_VALUE)) for key in jobs.keys]
        style = "dim" if job.error else None
        table.add_row(escape(jobs.label(job)), *values, *_measured(job, metrics), style=style)
    return table


def _short(text: str, most: int) -> str:
    half = most // 2
    return text if len(text) <= most else f"{text[: half - 1]}…{text[-half:]}"


def metrics_shown(jobs: Jobs) -> list[str]:
    """The metrics of a row: what the jobs are compared by, those of the test, and the seconds."""
    names = dict.fromkeys(name for job in jobs.all for name in job.result.metrics)
    first = [jobs.metric.name] if jobs.metric else []
    tests = [] if any(job.result.optimized_metric for job in jobs.all) else [n for n in names if n.startswith("test/")]
    return list(dict.fromkeys([*first, *tests, *(["seconds"] if "seconds" in names else [])]))


def _measured(job: Job, metrics: list[str]) -> list[str]:
    if job.error is not None:
        return [job.state, *[""] * (len(metrics) - 1)]
    return [digits(job.result.metrics.get(metric)) for metric in metrics]


def digits(value: float | None) -> str:
    """Four of them."""
    return "" if value is None else f"{value:.4g}"


def write_csv(jobs: Jobs, file: Path) -> None:
    """A row for each job, best first: where it is, what differs, how it ended, and all that it measured."""
    metrics = list(dict.fromkeys(name for job in jobs.all for name in job.result.metrics))
    with replaced(file) as new, new.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        sweeps = ["sweep"] if len(jobs.sweeps) > 1 else []
        writer.writerow([*sweeps, "job", *jobs.keys, "state", "error", *metrics])
        for job in jobs.ranked:
            values = [job.values.get(key, "") for key in jobs.keys]
            measured = [job.result.metrics.get(metric, "") for metric in metrics]
            ended = job.state, job.error or ""
            writer.writerow([*([str(job.sweep)] if sweeps else []), job.name, *values, *ended, *measured])


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A file of this process, which takes the place of another when it is whole: others may write that one too."""
    new = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield new
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
