"""How logs become those of all ranks in a run: by StepLogs, or in one process hardly at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lightning_dist.compat.lightning import TO_TENSOR, ResultCollection
from lightning_dist.data import DistributedBatches, DistributedStream
from lightning_dist.logs.results import collections_of
from lightning_dist.logs.step_logs import StepLogs
from lightning_dist.logs.values import to_tensor, whole
from lightning_dist.patches import Patches


def attach_logs(
    trainer: pl.Trainer,
    patches: Patches,
    monitored: set[str],
    group: dist.ProcessGroup | None,
    batches: Callable[[int], DistributedBatches | DistributedStream | None],
    stage: tuple[int, int] | None = None,
    is_even: Callable[[], bool] = lambda: False,
) -> StepLogs | None:
    """Makes what a module logs one value of all ranks, until an undo.

    Args:
        trainer: about to run, with its module set up.
        patches: of the run.
        monitored, batches, stage, is_even: see :class:`StepLogs`.
        group: the ranks that log different values; None for one process.

    Returns:
        None where one rank logs, or all log the same: then only numbers that ranks hold parts of are made whole.

    Communication: see :class:`StepLogs`.
    """
    module = trainer.lightning_module
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        patches.set(module, TO_TENSOR, partial(to_tensor, trainer.strategy.root_device))
    if group is None or dist.get_world_size(group) == 1:
        for results in collections_of(trainer):
            patches.set(results, "update_metrics", partial(_update_with_whole, results))
        return None
    logs = StepLogs(trainer, monitored, group, batches, stage, is_even)
    logs.attach(patches)
    return logs


def _update_with_whole(results: ResultCollection, key: str, value: Any, batch_size: int) -> None:
    """Communication: see :func:`whole`."""
    ResultCollection.update_metrics(results, key, whole(results, key, value), batch_size)
