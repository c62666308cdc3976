"""torchmetrics over ranks that hold different samples, also where some of them have none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_dist.compat.torchmetrics import (
    gathers_states,
    list_states,
    metric_state,
    num_updates,
    set_computed,
    set_num_updates,
    set_step_value,
)
from lightning_dist.patches import Patches


def attach_metrics(module: nn.Module, group: dist.ProcessGroup, patches: Patches) -> None:
    """Tells every torchmetrics metric of the module, until an undo, that the ranks of ``group`` hold different samples.

    Where they are all the ranks, a metric knows by itself, and stays free of a process group, which can be neither
    copied nor pickled.
    """
    if dist.get_world_size(group) == dist.get_world_size():
        return
    for metric in metrics_in(module):
        if metric.process_group is None:
            patches.set(metric, "process_group", group)


def metrics_in(module: nn.Module) -> Iterator[Metric]:
    """The module's metrics, itself included."""
    return (m for m in module.modules() if isinstance(m, Metric))


def align_states(metrics: Iterable[Metric], group: dist.ProcessGroup) -> None:
    """Prepares metrics to gather their states, also where a rank neither logged nor updated them.

    torchmetrics gathers as many tensors as a rank has in a list state, and of an empty list a vector of floats: ranks
    without rows get as many empty tensors as the others have.

    Args:
        metrics: the same ones in the same order on every rank; may contain others.
        group: the ranks that hold different samples.

    Communication: one all-gather of objects over the group if any has a list state.
    """
    within = [inner for metric in metrics for inner in metrics_in(metric)]
    states = [(metric, name) for metric in within if gathers_states(metric) for name in list_states(metric)]
    if states:
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, [_rows(metric, name) for metric, name in states], group)
        for (metric, name), rows in zip(states, zip(*everyone, strict=True), strict=True):
            count, dtype, shape = max(rows, key=itemgetter(0))
            state: Any = getattr(metric, name)
            device = "cpu" if metric.compute_on_cpu else metric.device
            state += [torch.zeros(0, *shape, dtype=dtype, device=device) for _ in range(count - len(state))]
    for metric in within:
        give_rows_a_dim(metric)
        set_computed(metric, None)  # a rank with a cached value would not gather


def give_rows_a_dim(metric: Metric) -> None:
    """Rows that are scalars become vectors of one, as when torchmetrics concatenates them: others may have none."""
    for name, join in list_states(metric).items():
        if join is dim_zero_cat:
            state: Any = getattr(metric, name)
            if isinstance(state, list):
                state[:] = [torch.atleast_1d(row) for row in state]


def _rows(metric: Metric, name: str) -> tuple[int, Any, Any]:
    """How many tensors torchmetrics gathers of a state that is a list; their dtype, their shape without the rows."""
    state: Any = getattr(metric, name)
    if not state:
        return 0, torch.float32, ()
    count = 1 if list_states(metric)[name] is dim_zero_cat else len(state)
    return count, state[0].dtype, tuple(torch.atleast_1d(state[0]).shape[1:])


class MetricSnapshot:
    """What a module's metrics have seen until now, to be put back."""

    def __init__(self, module: nn.Module) -> None:
        self._states = [(metric, metric_state(metric)) for metric in metrics_in(module)]

    def restore(self) -> None:
        """As if nothing had been seen since."""
        for metric, state in self._states:
            for name, before in state.values.items():
                setattr(metric, name, before)
            set_num_updates(metric, state.num_updates)
            set_step_value(metric, state.step_value)

    def restore_without_rows(self) -> None:
        """As if what was seen since had had no rows: a metric has updated, with nothing."""
        for metric, state in self._states:
            # torchmetrics warns of metrics that never were updated
            set_num_updates(metric, max(state.num_updates, min(num_updates(metric), 1)))
            set_step_value(metric, state.step_value)
            for name, before in state.values.items():
                rows = before
                if isinstance(before, list):
                    # no rows, but as many tensors as other ranks have, of the right dtype and rank
                    new: Any = getattr(metric, name)
                    rows = before + [_emptied(row) for row in new[len(before) :]]
                setattr(metric, name, rows)


def _emptied(row: Any) -> Any:
    return torch.atleast_1d(row)[:0] if isinstance(row, Tensor) else row[:0]
