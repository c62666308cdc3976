"""The jobs of sweeps, read from their directories: what was swept, how each ended, and which is best.

It needs nothing but files, so it does not matter which launcher ran the jobs, or on which machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from recipes.sweep.metric import Metric, find_metric
from recipes.sweep.result import NOT_ENDED, RESULT, JobResult
from recipes.sweep.running import is_running

STATES = ("done", "failed", "interrupted", "running", "not ended")
"""Of a job. ``not ended`` is one that was handed on (submitted, say), so that nobody here sees whether it runs."""


@dataclass(frozen=True, eq=False)
class Job:
    """A job of a sweep.

    Args:
        directory: that the job wrote to.
        sweep: the directory of its sweep.
        result: how it ended.
    """

    directory: Path
    sweep: Path
    result: JobResult

    @property
    def name(self) -> str:
        """Its directory below that of the sweep: a number, unless ``hydra.sweep.subdir`` says otherwise."""
        return str(self.directory.relative_to(self.sweep))

    @property
    def error(self) -> str | None:
        """The first line of what went wrong; None for a job that came to its end."""
        return self.result.error

    @cached_property
    def state(self) -> str:
        """One of :data:`STATES`, when it was first asked for."""
        if self.error != NOT_ENDED:
            return "failed" if self.error else "done"
        return {True: "running", False: "interrupted", None: "not ended"}[is_running(self.directory)]

    @cached_property
    def values(self) -> dict[str, str]:
        """What it was given, by key."""
        split = (override.lstrip("+").partition("=") for override in self.result.overrides)
        return {key: value.strip("'\"") for key, _, value in split}

    def measured(self, metric: str) -> float | None:
        """A metric; None where there is none, or it is not finite, or the job did not come to its end."""
        value = self.result.metrics.get(metric)
        return value if value is not None and self.error is None and math.isfinite(value) else None


@dataclass(frozen=True)
class Jobs:
    """The jobs of one sweep, or of several.

    Args:
        sweeps: their directories.
        all: the jobs, in the order of their sweeps and names.
        metric: by which they are compared; None where nothing was measured.
    """

    sweeps: tuple[Path, ...]
    all: tuple[Job, ...]
    metric: Metric | None

    @classmethod
    def read(cls, sweeps: Sequence[Path]) -> Jobs:
        """Those of these directories.

        Raises:
            ValueError: a directory is not there, or has no job.
        """
        found = [job for sweep in sweeps for job in _read(sweep)]
        return cls(tuple(sweeps), tuple(found), find_metric(found))

    @cached_property
    def keys(self) -> list[str]:
        """What was swept, and only that: the keys of the command line whose values differ between the jobs."""
        keys = dict.fromkeys(key for job in self.all for key in job.values)
        return [key for key in keys if len({job.values.get(key) for job in self.all}) > 1]

    @cached_property
    def fixed(self) -> list[str]:
        """What the command line gave to all jobs alike, as ``key=value``."""
        return [f"{key}={value}" for key, value in self.all[0].values.items() if key not in self.keys]

    @cached_property
    def ranked(self) -> list[Job]:
        """Best first; then those without a value, then those that failed."""
        return sorted(self.all, key=self._place)

    def of_state(self, state: str) -> list[Job]:
        """Those in one of :data:`STATES`."""
        return [job for job in self.all if job.state == state]

    @property
    def failed(self) -> list[Job]:
        """Those that ended with an error."""
        return self.of_state("failed")

    @property
    def best(self) -> Job | None:
        """The best one, of those with a value."""
        first = self.ranked[0]
        return first if self.value(first) is not None else None

    def value(self, job: Job) -> float | None:
        """What a job is compared by."""
        return job.measured(self.metric.name) if self.metric else None

    def label(self, job: Job) -> str:
        """The name of a job among these."""
        return f"{job.sweep.name}/{job.name}" if len(self.sweeps) > 1 else job.name

    def of(self, sweep: Path) -> Jobs:
        """The jobs of one of the sweeps."""
        return Jobs((sweep,), tuple(job for job in self.all if job.sweep == sweep), self.metric)

    def _place(self, job: Job) -> tuple[bool, bool, float]:
        value = self.value(job)
        sign = -1 if self.metric and self.metric.is_maximized else 1
        return job.error is not None, value is None, 0.0 if value is None else sign * value


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """For each dotted name its shortest end that no other one has: ``optimizer.lr`` is ``lr``."""
    keys = list(keys)
    parts = {key: key.split(".") for key in keys}

    def shortest(key: str) -> str:
        own = parts[key]
        for length in range(1, len(own)):
            end = own[-length:]
            if not any(other != key and parts[other][-length:] == end for other in keys):
                return ".".join(end)
        return key

    return {key: shortest(key) for key in keys}


def _read(sweep: Path) -> list[Job]:
    if not sweep.is_dir():
        raise ValueError(f"{sweep} is no directory; pass that of a sweep, as hydra.sweep.dir names it")
    left = {file.parent: JobResult.of(file.parent) for file in sweep.rglob(RESULT)}
    results = {directory: result for directory, result in left.items() if result is not None}
    for file in sweep.rglob(".hydra/overrides.yaml"):
        if (directory := file.parent.parent) not in results:  # it was ended before it could begin to write
            overrides: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
            results[directory] = JobResult(list(map(str, overrides)), NOT_ENDED, {})
    if not results:
        raise ValueError(f"{sweep} has no jobs: no {RESULT} is in it or below")
    return [Job(directory, sweep, results[directory]) for directory in sorted(results, key=_by_number)]


def _by_number(directory: Path) -> tuple[bool, int, str]:
    name = directory.name
    return not name.isdecimal(), int(name) if name.isdecimal() else 0, str(directory)
