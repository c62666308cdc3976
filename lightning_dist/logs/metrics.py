"""torchmetrics over ranks that hold different samples, also where some of them have none, or repeat a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_dist.compat import torchmetrics as private
from lightning_dist.patches import Patches
from lightning_dist.snapshot import Snapshot, is_users


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
    """Prepares metrics to gather their states, also where a rank of the group neither logged nor updated them.

    torchmetrics gathers as many tensors as a rank has in a list state, and of an empty list a vector of floats: ranks
    without rows get as many empty tensors as the others have. The metrics are the same ones in the same order on every
    rank, and may contain others.

    Communication: one all-gather of objects over the group if any has a list state.
    """
    within = [inner for metric in metrics for inner in metrics_in(metric)]
    gathering = [metric for metric in within if private.gathers_states(metric)]
    states = [(metric, name) for metric in gathering for name in private.list_states(metric)]
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
        private.set_computed(metric, None)  # a rank with a cached value would not gather


def give_rows_a_dim(metric: Metric) -> None:
    """Rows that are scalars become vectors of one, as when torchmetrics concatenates them: others may have none."""
    for name, join in private.list_states(metric).items():
        if join is dim_zero_cat:
            state: Any = getattr(metric, name)
            if isinstance(state, list):
                state[:] = [torch.atleast_1d(row) for row in state]


def _rows(metric: Metric, name: str) -> tuple[int, Any, Any]:
    """How many tensors torchmetrics gathers of a state that is a list; their dtype, their shape without the rows."""
    state: Any = getattr(metric, name)
    if not state:
        return 0, torch.float32, ()
    count = 1 if private.list_states(metric)[name] is dim_zero_cat else len(state)
    return count, state[0].dtype, tuple(torch.atleast_1d(state[0]).shape[1:])


class MetricSnapshot:
    """What a module's metrics have seen until now, to be put back."""

    def __init__(self, module: nn.Module) -> None:
        self._states = [(metric, private.metric_state(metric)) for metric in metrics_in(module)]

    def restore(self) -> None:
        """As if nothing had been seen since."""
        for metric, state in self._states:
            for name, before in state.values.items():
                setattr(metric, name, before)
            private.set_num_updates(metric, state.num_updates)
            private.set_step_value(metric, state.step_value)

    def restore_without_rows(self) -> None:
        """As if what was seen since had had no rows: a metric has updated, with nothing."""
        for metric, state in self._states:
            # torchmetrics warns of metrics that never were updated
            private.set_num_updates(metric, max(state.num_updates, min(private.num_updates(metric), 1)))
            private.set_step_value(metric, state.step_value)
            for name, before in state.values.items():
                rows, new = before, getattr(metric, name)
                if isinstance(before, list):  # as many tensors as other ranks have, of their dtype and rank
                    rows = [torch.atleast_1d(row) if isinstance(row, Tensor) else row for row in new[len(before) :]]
                    rows = before + [row[:0] for row in rows]
                setattr(metric, name, rows)


class RepeatedBatch:
    """How metrics, modules and callbacks of a trainer stood before an evaluation batch that this rank only repeats.

    [Note: a batch that only runs along]
    A rank that has no batch left runs a batch once more, with all hooks, since what runs inside may wait for every
    rank: gathers of shards, the user's own. Then all that it left in Python is taken back: what was appended to lists,
    counted in numbers, tensors, buffers and dictionaries of the module, its networks, the user's own callbacks and the
    objects of the user's own classes that they hold. Files and loggers that a step writes by itself can't be.

    A list that would be empty then, on a rank without any batch of its own, keeps what was appended, without its rows.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        module = trainer.lightning_module
        self._metrics = MetricSnapshot(module)
        others: list[Any] = [*trainer.callbacks, getattr(trainer, "datamodule", None)]  # type: ignore[attr-defined]
        parts = list(_modules(module))
        owners = [*parts, *(owner for owner in others if is_users(type(owner)))]
        self._snapshot = Snapshot(owners, of_module=_metrics_without_rows)
        self._snapshot.add(*(buffer for part in parts for buffer in part.buffers(recurse=False)))

    def undo(self) -> None:
        """As if the batch had had no rows."""
        self._snapshot.restore()
        self._metrics.restore_without_rows()


def _metrics_without_rows(module: nn.Module) -> Callable[[], None] | None:
    # metrics may be held outside of modules, in a list or by a callback
    return MetricSnapshot(module).restore_without_rows if any(True for _ in metrics_in(module)) else None


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that may hold what a user counts: not torch's own layers, and not metrics, which have states."""
    within = {part for metric in metrics_in(module) for part in metric.modules()}
    for part in module.modules():
        # of a sharded module, fully_shard makes a class of torch's that derives from the user's
        projects = {base.__module__.partition(".")[0] for base in type(part).__mro__}
        if part not in within and not projects <= {"torch", "builtins"}:
            yield part
