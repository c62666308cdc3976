"""What a job leaves in its directory, and the table over all jobs of a sweep."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

RESULT = "result.json"


@dataclass(frozen=True)
class JobResult:
    """How a job ended; written to ``result.json`` in its directory.

    Args:
        overrides: what the command line changed.
        error: the first line of what went wrong, ``None`` for a job that came to its end.
        metrics: the logged metrics by name.
        optimized_metric: the name of the metric that the sweep is about, if any.
    """

    overrides: list[str]
    error: str | None
    metrics: dict[str, float]
    optimized_metric: str | None = None

    def save(self, directory: Path) -> None:
        """Writes the result to the job's directory."""
        (directory / RESULT).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, file: Path) -> JobResult:
        """Reads what :meth:`save` wrote."""
        return cls(**json.loads(file.read_text()))


class SweepTable(Callback):
    """Prints a table of all jobs when a sweep ends, and exits with status 1 if any of them failed.

    It reads the directories of the jobs, so it doesn't matter which Hydra launcher ran them.
    """

    def __init__(self) -> None:
        self._started = 0.0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remembers when the sweep began: its directory may hold the jobs of an earlier one."""
        self._started = time.time()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the table.

        Raises:
            SystemExit: a job failed.
        """
        files = [f for f in Path(config.hydra.sweep.dir).rglob(RESULT) if f.stat().st_mtime >= self._started]
        files.sort(key=lambda file: file.stat().st_mtime)
        results = [JobResult.load(file) for file in files]
        table = Table(title="Sweep")
        for column in ("job", "overrides", "status", *_columns(results)):
            table.add_column(column, overflow="fold")
        for file, result in zip(files, results, strict=True):
            values = [f"{result.metrics[name]:.4g}" if name in result.metrics else "" for name in _columns(results)]
            table.add_row(file.parent.name, "\n".join(result.overrides), result.error or "done", *values)
        Console().print(table)
        num_failed = sum(result.error is not None for result in results)
        if num_failed:
            Console().print(f"{num_failed} of {len(results)} jobs failed; their logs are in {config.hydra.sweep.dir}")
            raise SystemExit(1)


def _columns(results: list[JobResult]) -> list[str]:
    """The metrics to show: the optimised one if there is one, else those of the test, and the seconds."""
    optimized = {result.optimized_metric for result in results} - {None}
    names = dict.fromkeys(name for result in results for name in result.metrics)
    shown = [name for name in names if name in optimized or (not optimized and name.startswith("test/"))]
    return [*shown, *(["seconds"] if "seconds" in names else [])]
