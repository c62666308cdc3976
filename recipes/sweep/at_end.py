"""What a sweep does when all its jobs have ended: a table in the terminal, ``sweep.csv`` and ``report.html``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console

from recipes.sweep.jobs import Jobs
from recipes.sweep.table import print_table, write_csv

log = logging.getLogger("recipes.train")

CSV, REPORT = "sweep.csv", "report.html"


class SweepTable(Callback):
    """Prints a table of all jobs when a sweep ends, writes ``sweep.csv`` and ``report.html`` to its directory, and
    exits with status 1 if any of them failed.

    It reads the directories of the jobs, so it doesn't matter which Hydra launcher ran them.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints and writes.

        Raises:
            SystemExit: a job failed.
        """
        directory = Path(config.hydra.sweep.dir)
        jobs = Jobs.read([directory])
        console = Console()
        print_table(jobs, console)
        write_csv(jobs, directory / CSV)
        _report(jobs, directory / REPORT, console)
        if jobs.failed:
            told = f"{len(jobs.failed)} of {len(jobs.all)} jobs failed; their logs are in {directory}"
            console.print(told, highlight=False, soft_wrap=True)
            raise SystemExit(1)


def _report(jobs: Jobs, file: Path, console: Console) -> None:
    from recipes.sweep.report import write_report  # slow to import

    try:
        write_report(jobs, file)
        console.print(f"{file} shows them", highlight=False, soft_wrap=True)
    except ImportError as error:
        log.warning("no %s: %s", file.name, error)
