"""What a step logs, counted as one process counts it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

NEUTRAL = {"mean": 0.0, "sum": 0.0, "min": float("inf"), "max": float("-inf")}
"""What a step logs that is not counted, by reduction."""

_LOG_PARAMETERS = [name for name in inspect.signature(pl.LightningModule.log).parameters if name != "self"]


def reduce_over(tensor: Tensor, group: dist.ProcessGroup, reduce_op: dist.ReduceOp | str | None) -> Tensor:
    """The tensor reduced over the ranks of a group; a new tensor.

    Lightning's own mean of an integer tensor truncates (the mean of batch sizes 6 and 7 becomes 6, seen in 2.6.6);
    here it is taken in float64.

    Args:
        tensor: on the device of the group's backend.
        group: the ranks that hold different values.
        reduce_op: ``"mean"``, ``"avg"``, ``"sum"``, ``"min"``, ``"max"``, a ``ReduceOp`` or None (sum).

    Communication: one all-reduce over the group, none for a group of one.
    """
    name = reduce_op.lower() if isinstance(reduce_op, str) else None
    mean = name in ("mean", "avg") or reduce_op == dist.ReduceOp.AVG
    tensor = tensor.double() if mean and not tensor.is_floating_point() else tensor.clone()
    num_ranks = dist.get_world_size(group)
    if num_ranks == 1:
        return tensor
    if mean:  # gloo has no ReduceOp.AVG
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group)
        return tensor / num_ranks
    op = getattr(dist.ReduceOp, name.upper()) if name else reduce_op or dist.ReduceOp.SUM
    dist.all_reduce(tensor, op, group)
    return tensor


class StepLogs:
    """Stands between a module's ``self.log`` in its steps and Lightning's.

    [Note: what a module logs is synchronised]
    A module written for one process logs without ``sync_dist``. Over several data ranks Lightning then keeps each
    rank's own value: the logged mean is that of rank 0's samples, and schedulers and callbacks that monitor it decide
    apart. So every value is logged as with ``sync_dist=True``: what is accumulated over an epoch is reduced over the
    data ranks at its end; what is logged at a step is reduced at the steps that the logger writes
    (``log_every_n_steps``), always if a scheduler or callback decides by it or the module said ``sync_dist=True``, and
    stays the rank's own in between, where only the progress bar shows it. ``rank_zero_only=True`` is left alone.

    Communication: one all-reduce over the data ranks for each value that is reduced, two for an epoch's mean.

    Args:
        module: whose ``log`` is replaced while a step runs.
        monitored: names by which schedulers and callbacks decide.
    """

    def __init__(self, module: pl.LightningModule, monitored: set[str]) -> None:
        self.module, self.monitored = module, monitored
        self.local_for_now = False
        """Whether the value being logged stays the rank's own until the end of the epoch."""

    @contextmanager
    def synchronised(self) -> Iterator[None]:
        """While it lasts, ``module.log`` follows [Note: what a module logs is synchronised]."""
        original = self.module.log

        @functools.wraps(original)
        def log(*args: Any, **kwargs: Any) -> None:
            name, value, options = _named(args, kwargs)
            if options.get("rank_zero_only"):
                return original(name, value, **options)
            decides = {name, f"{name}_step"} & self.monitored or options.get("sync_dist")
            written = self.module.trainer._logger_connector.should_update_logs
            self.local_for_now = not (decides or written)
            try:
                return original(name, value, **{**options, "sync_dist": True})
            finally:
                self.local_for_now = False

        with _shadowed(self.module, log):
            yield

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """While it lasts, metrics and logs take part in every collective but count for nothing.

        For the step of a rank that has no batch of its own left. Metric states are put back afterwards; what was
        logged is logged again with batch size 0 and a neutral value, so that every rank knows the same names.
        """
        metrics = [m for m in self.module.modules() if isinstance(m, Metric)]
        kept = [(m, m._copy_state_dict(), m._update_count, m._computed, m._forward_cache) for m in metrics]
        calls: list[tuple[str, Any, dict[str, Any]]] = []

        def log(*args: Any, **kwargs: Any) -> None:
            calls.append(_named(args, kwargs))

        with _shadowed(self.module, log):
            yield
        for metric, state, update_count, computed, forward_cache in kept:
            for name, before in state.items():
                if isinstance(before, list) and not before:
                    # no rows, but of the right dtype and rank: torchmetrics gathers [] as a vector of floats
                    setattr(metric, name, [row[:0] for row in getattr(metric, name)])
                else:
                    setattr(metric, name, before)
            # it has been updated, with nothing; torchmetrics warns of metrics that never were
            metric._update_count, metric._computed = max(update_count, min(metric._update_count, 1)), computed
            metric._forward_cache = forward_cache
        with self.synchronised():
            for name, value, kwargs in calls:
                if not isinstance(value, Metric):
                    reduction = kwargs.get("reduce_fx", "mean")
                    reduction = reduction if isinstance(reduction, str) else reduction.__name__
                    value = NEUTRAL["mean" if reduction == "avg" else reduction]
                self.module.log(name, value, **{**kwargs, "batch_size": 0})


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any, dict[str, Any]]:
    """Name, value and options of a call of ``log``, however the caller passed them."""
    options = {**dict(zip(_LOG_PARAMETERS, args, strict=False)), **kwargs}
    return options.pop("name"), options.pop("value"), options


@contextmanager
def _shadowed(module: pl.LightningModule, log: Any) -> Iterator[None]:
    """``module.log`` is ``log`` while it lasts; ``log_dict`` calls it too."""
    before = module.__dict__.get("log")
    module.__dict__["log"] = log
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["log"]
        else:
            module.__dict__["log"] = before


def attach_metrics(module: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Tells every torchmetrics metric of the module that the ranks of ``group`` hold different samples."""
    for metric in module.modules():
        if isinstance(metric, Metric) and metric.process_group is None:
            metric.process_group = group
