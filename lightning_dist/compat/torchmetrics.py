"""Private names of torchmetrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchmetrics import Metric

from lightning_dist.compat.names import uses


@dataclass(frozen=True)
class MetricState:
    """What a metric has seen.

    Args:
        values: of its states, by name; lists are copies.
        num_updates: since it was reset.
        step_value: of its last batch alone.
    """

    values: dict[str, Any]
    num_updates: int
    step_value: Any


@uses("torchmetrics.Metric._copy_state_dict", "torchmetrics.Metric._update_count", "torchmetrics.Metric._forward_cache")
def metric_state(metric: Metric) -> MetricState:
    """What a metric has seen until now, to be put back."""
    return MetricState(metric._copy_state_dict(), metric._update_count, metric._forward_cache)


@uses("torchmetrics.Metric._update_count")
def num_updates(metric: Metric) -> int:
    """How often a metric was updated since it was reset."""
    return metric._update_count


@uses("torchmetrics.Metric._update_count")
def set_num_updates(metric: Metric, count: int) -> None:
    """Says how often a metric was updated: it warns where it never was."""
    metric._update_count = count


@uses("torchmetrics.Metric._forward_cache")
def step_value(metric: Metric) -> Any:
    """The value of a metric's last batch alone."""
    return metric._forward_cache


@uses("torchmetrics.Metric._forward_cache")
def set_step_value(metric: Metric, value: Any) -> None:
    """Puts another value in the place of that of a metric's last batch."""
    metric._forward_cache = value


@uses("torchmetrics.Metric._computed")
def forget_computed(metric: Metric) -> None:
    """Lets a metric compute again, and gather for it."""
    metric._computed = None


@uses("torchmetrics.Metric._defaults", "torchmetrics.Metric._reductions")
def list_states(metric: Metric) -> dict[str, Any]:
    """The states that are lists, with how torchmetrics joins each, by name."""
    return {name: metric._reductions[name] for name, value in metric._defaults.items() if isinstance(value, list)}


@uses("torchmetrics.Metric._sync_dist")
def gathers_states(metric: Metric) -> bool:
    """Whether a metric gathers its states as torchmetrics does, not by a method of its own."""
    return type(metric)._sync_dist is Metric._sync_dist
