"""``lightning-dist report``: the table and the page of sweeps, made anew from their directories."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from recipes.sweep.at_end import CSV, REPORT
from recipes.sweep.jobs import Jobs
from recipes.sweep.report import write_report
from recipes.sweep.table import print_table, write_csv


def report(directories: list[Path], output: Path | None) -> None:
    """Prints the table and writes the page and ``sweep.csv`` beside it; pyproject.toml names this function.

    Args:
        directories: of the sweeps; several are compared.
        output: the page; by default ``report.html`` in the directory of a single sweep.

    Raises:
        ValueError: a directory has no jobs, or several sweeps and no output were given, or Plotly is missing.
    """
    if output is None:
        if len(directories) > 1:
            raise ValueError("several sweeps are compared in a file of its own; pass --output FILE")
        output = directories[0] / REPORT
    jobs = Jobs.read(directories)
    print_table(jobs, Console())
    try:
        write_report(jobs, output)
    except ImportError as error:
        raise ValueError(str(error)) from None
    table = output.with_name(CSV) if output.name == REPORT else output.with_suffix(".csv")
    write_csv(jobs, table)
    print(f"wrote {output} and {table}")
