"""Which metric the jobs of a sweep are compared by, and which end of it is good."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.sweep.result import JobResult

SMALL_IS_GOOD = (
    *("loss", "losses", "logloss", "error", "errors", "err", "perplexity", "ppl", "bits", "nats", "nll", "entropy"),
    *("bce", "brier", "mse", "mae", "rmse", "mape", "wer", "cer", "ter", "fid", "cost", "costs", "regret", "latency"),
    *("time", "seconds", "wait", "memory", "collision", "collisions"),
)
"""Words in the names of metrics of which less is better, where a config does not say it."""

LARGE_IS_GOOD = (
    *("accuracy", "acc", "auc", "auroc", "f1", "bleu", "chrf", "reward", "return", "precision", "recall"),
    *("sensitivity", "specificity", "gini", "ks", "r2", "dice", "iou", "map"),
)
"""And of which more is, as it is of what has no such word."""


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
    """A band with one end tells which is the good one."""
    name = _select(cfg, "expected.metric")
    if name is None:
        return None
    has_low, has_high = (_select(cfg, f"expected.{end}") is not None for end in ("at_least", "at_most"))
    return Metric(name, has_low if has_low != has_high else not _is_small_good(name))


def _select(cfg: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(cfg, key)
    except OmegaConfBaseException:  # it refers to what only a job knows
        return None


def _is_small_good(name: str) -> bool:
    """By the last word that tells, which is the thing itself: ``cost_weighted_accuracy``, ``dice_loss``. What follows
    ``per`` and ``at`` only says of what: ``loss_per_byte``, ``recall_at_error``.
    """
    written = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name).lower()  # MeanSquaredError
    words = re.split(r"[^a-z0-9]+", re.split(r"(?<![a-z0-9])(?:per|at)(?![a-z0-9])", written)[0])
    known = {*SMALL_IS_GOOD, *LARGE_IS_GOOD}
    telling = [found for word in words for found in (word, word.rstrip("0123456789")) if found in known]
    return bool(telling) and telling[-1] in SMALL_IS_GOOD
