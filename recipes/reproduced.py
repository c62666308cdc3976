"""What runs of experiments have reached: beside the band, simpler models, and other layouts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from recipes.experiments import Band, Experiment, Point, Reproduction


@dataclass(frozen=True)
class Run:
    """One run of an experiment.

    Args:
        experiment: its name.
        layout: as the experiment writes it.
        seed: of the run.
        point: values of the keys that it is repeated over.
        parent: the directory of all runs.
        metrics: what it logged, by name.
        error: what went wrong.
        seconds: that its process took.
    """

    experiment: str
    layout: str
    seed: int
    point: Point
    parent: Path
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        return " ".join([self.experiment, self.layout, f"seed {self.seed}", *(f"{k}={v}" for k, v in self.point)])

    @property
    def directory(self) -> Path:
        """For its checkpoints and its log."""
        names = [self.layout, f"seed{self.seed}", *(f"{key}={value}" for key, value in self.point)]
        return self.parent.joinpath(self.experiment, *(re.sub(r"[^\w.-]+", "-", name) for name in names))

    def ended(self, metrics: dict[str, float], error: str | None, seconds: float) -> Run:
        """With what came of it."""
        return replace(self, metrics=metrics, error=error, seconds=seconds)

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {**_plain(self), "directory": str(self.directory.relative_to(self.parent))}


@dataclass(frozen=True)
class Outcome:
    """What an experiment reached under one layout with one seed.

    Args:
        experiment: with a band.
        runs: one for each value of what it is repeated over.
    """

    experiment: Experiment
    runs: Sequence[Run]

    @property
    def error(self) -> str | None:
        """What went wrong in one of the runs."""
        lacking = f"it did not log {self.band.metric}"
        return next(
            (run.error or lacking for run in self.runs if run.error or self.band.metric not in run.metrics), None
        )

    @property
    def band(self) -> Band:
        """Where its metric should lie."""
        assert self.experiment.band is not None
        return self.experiment.band

    @property
    def value(self) -> float:
        """The mean of the metric over the runs; not a number if one failed."""
        return self._mean(self.band.metric)

    @property
    def verdict(self) -> str:
        """``within``, ``outside`` or ``failed``."""
        return "failed" if self.error else ("within" if self.band.holds(self.value) else "outside")

    @property
    def beside(self) -> dict[str, float]:
        """The figures to show beside it, by name."""
        named: Any = self.experiment.reproduction.beside if self.experiment.reproduction else {}
        values = {name: self._mean(what) if isinstance(what, str) else what for name, what in named.items()}
        return {name: value for name, value in values.items() if value == value}

    @property
    def seconds(self) -> float:
        """Of all its runs."""
        return sum(run.seconds for run in self.runs)

    def line(self) -> str:
        """One run in one line; the band is not of a run that is one of those whose mean counts."""
        is_part = bool(self.experiment.reproduction and self.experiment.reproduction.over)
        what = self.error or f"{self.band.metric} {self.value:.4f}" + ("" if is_part else f" ({self.band})")
        verdict = "" if is_part else f"{self.verdict}, "
        return f"{self.runs[0]}: {what}: {verdict}{self.seconds:.0f} s"

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        first = self.runs[0]
        return {
            **{name: getattr(first, name) for name in ("experiment", "layout", "seed")},
            **{name: getattr(self.band, name) for name in ("metric", "at_least", "at_most")},
            "value": None if self.error else self.value,
            **{name: getattr(self, name) for name in ("beside", "verdict", "error", "seconds")},
        }

    def _mean(self, metric: str) -> float:
        values = [run.metrics.get(metric, float("nan")) for run in self.runs]
        return fmean(values)


@dataclass(frozen=True)
class Agreement:
    """How far the layouts of an experiment are apart with one seed.

    Args:
        experiment: its name.
        seed: of the runs.
        metric: that is compared.
        distance: of the two that are furthest apart, in any run that is repeated; NaN where one of them is.
        within: how far they may be apart; None if each has to lie in the band only.
    """

    experiment: str
    seed: int
    metric: str
    distance: float
    within: float | None

    @property
    def holds(self) -> bool:
        """Whether they are no further apart than they may; not if one is no number."""
        return not math.isnan(self.distance) and (self.within is None or self.distance <= self.within)

    def __str__(self) -> str:
        if math.isnan(self.distance):
            return f"{self.experiment}, seed {self.seed}: {self.metric} is not a number under all layouts: DIFFER"
        bound = "" if self.within is None else f", at most {self.within:g}: {'agree' if self.holds else 'DIFFER'}"
        return f"{self.experiment}, seed {self.seed}: the layouts' {self.metric} differ by {self.distance:.2g}{bound}"

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {**vars(self), "holds": self.holds}


def outcomes(experiments: Iterable[Experiment], runs: Sequence[Run]) -> list[Outcome]:
    """By experiment, layout and seed, of those whose runs have all come to an end."""
    found = []
    for experiment in experiments:
        reproduction: Reproduction = experiment.reproduction  # type: ignore[assignment]
        num_points = len(list(reproduction.points()))
        for layout in reproduction.layouts:
            for seed in reproduction.seeds:
                key = (experiment.name, layout, seed)
                own = [run for run in runs if (run.experiment, run.layout, run.seed) == key]
                if len(own) == num_points:
                    found.append(Outcome(experiment, own))
    return found


def agreements(experiments: Iterable[Experiment], runs: Sequence[Run]) -> list[Agreement]:
    """By experiment and seed, of those that came to an end under at least two layouts."""
    found = []
    for experiment in experiments:
        metric, reproduction = experiment.band.metric, experiment.reproduction  # type: ignore[union-attr]
        assert reproduction is not None
        for seed in reproduction.seeds:
            by_point: dict[Point, list[float]] = {}
            for run in runs:
                if (run.experiment, run.seed) == (experiment.name, seed) and metric in run.metrics:
                    by_point.setdefault(run.point, []).append(run.metrics[metric])
            distances = [_largest(values) - min(values) for values in by_point.values() if len(values) > 1]
            if distances:
                within = reproduction.layouts_within
                found.append(Agreement(experiment.name, seed, metric, _largest(distances), within))
    return found


def _largest(values: Sequence[float]) -> float:
    """Not a number if one of them is none, which ``max`` leaves to their order."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def table(found: Sequence[Outcome]) -> Table:
    """What to show at the end."""
    shown = Table(title="Reproduced", title_justify="left")
    for column in ("experiment", "layout", "seed", "metric", "measured", "band", "beside", "", "seconds"):
        right = column in ("seed", "measured", "seconds")
        shown.add_column(column, overflow="fold", justify="right" if right else "left")
    for outcome in found:
        first, band = outcome.runs[0], outcome.band
        ends = " to ".join("" if end is None else f"{end:g}" for end in (band.at_least, band.at_most))
        beside = "\n".join(f"{name} {value:.4f}" for name, value in outcome.beside.items())
        measured = "" if outcome.error else f"{outcome.value:.4f}"
        over = f"\nmean of {len(outcome.runs)}" if len(outcome.runs) > 1 else ""
        cells = (first.experiment, first.layout, str(first.seed), band.metric + over, measured, ends.strip(), beside)
        shown.add_row(*cells, outcome.error or outcome.verdict, f"{outcome.seconds:.0f}")
    return shown


def _plain(run: Run) -> dict[str, Any]:
    values = {name: value for name, value in vars(run).items() if name != "parent"}
    return {**values, "point": dict(run.point)}
