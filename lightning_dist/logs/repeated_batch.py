"""What a batch leaves behind that another rank counts: it is undone, so that each sample counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_dist.logs.metrics import MetricSnapshot, metrics_in
from lightning_dist.snapshot import Snapshot, is_users


class RepeatedBatch:
    """How metrics, modules and callbacks stood before an evaluation batch that this rank only repeats.

    [Note: a batch that only runs along]
    A rank that has no batch left runs a batch once more, with all hooks, since what runs inside may wait for every
    rank: gathers of shards, the user's own. Then all that it left in Python is taken back: what was appended to lists,
    counted in numbers, tensors, buffers and dictionaries of the module, its networks, the user's own callbacks and the
    objects of the user's own classes that they hold. Files and loggers that a step writes by itself can't be.

    A list that would be empty then, on a rank without any batch of its own, keeps what was appended, without its rows.

    Args:
        trainer: in an evaluation or a prediction.
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
    """Also for metrics that are held outside of modules, in a list or by a callback."""
    return MetricSnapshot(module).restore_without_rows if any(True for _ in metrics_in(module)) else None


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that may hold what a user counts: not torch's own layers, and not metrics, which have states."""
    within = {part for metric in metrics_in(module) for part in metric.modules()}
    for part in module.modules():
        if part not in within and not _is_torchs(type(part)):
            yield part


def _is_torchs(kind: type) -> bool:
    # of a sharded module, fully_shard makes a class of torch's that derives from the user's
    return all(base.__module__.split(".")[0] in ("torch", "builtins") for base in kind.__mro__)
