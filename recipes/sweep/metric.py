"""Which metric the jobs of a sweep are compared by, and which end of it is good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.sweep.result import JobResult

SMALL_IS_GOOD = ("loss", "error", "perplexity", "brier", "mse", "mae", "rmse", "nll", "cost", "seconds", "time")
"""Parts of the names of metrics of which less is better, where a config does not say it."""


@dataclass(frozen=True)
class Metric:
    """What jobs are compared by.

    Args:
        name: as it is logged.
        is_maximized: whether more of it is better.
    """

    name: str
    is_maximized: bool

    @property
    def direction(self) -> str:
        """In words."""
        return "more is better" if self.is_maximized else "less is better"


class _Job(Protocol):
    @property
    def directory(self) -> Path: ...
    @property
    def result(self) -> JobResult: ...


def metric_of(cfg: DictConfig) -> Metric | None:
    """That of a config: ``optimized_metric``, else what its checkpoints go by, else what it expects."""
    monitor, expected = _monitored(cfg), _expected(cfg)
    optimized = _select(cfg, "optimized_metric")
    if optimized is None:
        return monitor or expected
    by_name = {metric.name: metric for metric in (expected, monitor) if metric is not None}
    return by_name.get(optimized) or Metric(optimized, not _is_small_good(optimized))


def find_metric(jobs: Sequence[_Job]) -> Metric | None:
    """That of the first job whose config tells; else of what jobs have measured, tests first."""
    for job in jobs:
        file = job.directory / ".hydra" / "config.yaml"
        if not file.is_file():
            continue
        cfg = OmegaConf.load(file)
        assert isinstance(cfg, DictConfig)
        metric = metric_of(cfg)
        if metric is not None and any(metric.name in other.result.metrics for other in jobs):
            return metric
    names = dict.fromkeys(name for job in jobs for name in job.result.metrics)
    found = min(names, key=lambda name: not name.startswith("test/"), default=None)
    return None if found is None else Metric(found, not _is_small_good(found))


def _monitored(cfg: DictConfig) -> Metric | None:
    name = _select(cfg, "callbacks.checkpoint.monitor")
    return None if name is None else Metric(name, _select(cfg, "callbacks.checkpoint.mode") == "max")


def _expected(cfg: DictConfig) -> Metric | None:
    name = _select(cfg, "expected.metric")
    return None if name is None else Metric(name, _select(cfg, "expected.at_least") is not None)


def _select(cfg: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(cfg, key)
    except OmegaConfBaseException:  # it refers to what only a job knows
        return None


def _is_small_good(name: str) -> bool:
    return any(part in name.lower() for part in SMALL_IS_GOOD)
