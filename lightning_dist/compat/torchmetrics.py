"""Private names of torchmetrics."""

from __future__ import annotations

from typing import Any, NamedTuple

from torchmetrics import Metric

from lightning_dist.compat.names import getter, setter, uses

num_updates = getter("torchmetrics.Metric._update_count", "how often a metric was updated since it was reset")
set_num_updates = setter("torchmetrics.Metric._update_count", "says how often; a metric warns where it never was")
set_computed = setter("torchmetrics.Metric._computed", "puts a value; for None, a metric gathers and computes it")
step_value = getter("torchmetrics.Metric._forward_cache", "the value of a metric's last batch alone")
set_step_value = setter("torchmetrics.Metric._forward_cache", "puts another value in the place of the last batch's")


class MetricState(NamedTuple):
    """What a metric has seen: its states by name (lists are copies), updates since a reset, last batch's value."""

    values: dict[str, Any]
    num_updates: int
    step_value: Any


@uses("torchmetrics.Metric._copy_state_dict")
def metric_state(metric: Metric) -> MetricState:
    """What a metric has seen until now, to be put back."""
    return MetricState(metric._copy_state_dict(), num_updates(metric), step_value(metric))


@uses("torchmetrics.Metric._defaults", "torchmetrics.Metric._reductions")
def list_states(metric: Metric) -> dict[str, Any]:
    """The states that are lists, with how torchmetrics joins each, by name."""
    return {name: metric._reductions[name] for name, value in metric._defaults.items() if isinstance(value, list)}


@uses("torchmetrics.Metric._sync_dist")
def gathers_states(metric: Metric) -> bool:
    """Whether a metric gathers its states as torchmetrics does, not by a method of its own."""
    return type(metric)._sync_dist is Metric._sync_dist
