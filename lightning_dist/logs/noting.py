"""What a module logs on this rank, noted with the weight that it has beside what other ranks log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_dist.compat.lightning import EXTRACT_BATCH_SIZE, Metadata, ResultCollection, leave_unreduced
from lightning_dist.logs.reductions import reduction_of
from lightning_dist.logs.results import ReducedResults
from lightning_dist.logs.values import first_batch_size, whole
from lightning_dist.patches import Patches


class NotedLogs:
    """Wraps the methods by which Lightning takes what is logged, and notes it instead of reducing it.

    Args:
        trainer: of the logs.
        results: which reduce what is noted.
        is_even: whether all data ranks have as many samples of a training batch.
        repeats_hooks: whether another stage of the pipeline runs the hooks of this one too, and counts their sums.
    """

    def __init__(
        self, trainer: pl.Trainer, results: ReducedResults, is_even: Callable[[], bool], repeats_hooks: bool
    ) -> None:
        self._trainer, self._results, self._is_even, self._repeats_hooks = trainer, results, is_even, repeats_hooks
        self.in_step = False
        """Whether a step logs now, not a hook."""
        self.counts = True
        """Whether the batch that runs is this rank's own."""
        self._size: int | None = None
        """First size in the batch."""
        self._is_given = False
        """Whether the user gave the batch size of the value that is logged."""

    def attach(self, results: ResultCollection, patches: Patches) -> None:
        """Begins to note what is logged to a collection."""
        self._results.add(results)
        patches.set(results, "update_metrics", lambda *args: self._update(results, *args))
        patches.set(results, EXTRACT_BATCH_SIZE, lambda *args: self._batch_size(results, *args))

    def begin_batch(self) -> None:
        """Another batch begins, of this rank's own."""
        self._size, self.counts = None, True

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """While it lasts, a step logs; outside of it, hooks do."""
        self.in_step = True
        try:
            yield
        finally:
            self.in_step = False

    def _batch_size(self, results: ResultCollection, value: Any, batch_size: int | None, meta: Metadata) -> int:
        # Lightning weights a step's value by whatever another `log` of this rank's batch found
        self._is_given = batch_size is not None
        if batch_size is None and not (value.is_tensor and meta.on_epoch):
            if self._size is None:
                self._size = first_batch_size(results.batch)
            return self._size
        size: int = getattr(ResultCollection, EXTRACT_BATCH_SIZE)(results, value, batch_size, meta)
        return size

    def _update(self, results: ResultCollection, key: str, value: Any, batch_size: int) -> None:
        meta, is_tensor = results[key].meta, results[key].is_tensor
        value = whole(results, key, value)
        if value is None:
            return
        if meta.sync.group is None:
            leave_unreduced(meta)
        is_training, reduction = self._trainer.training, reduction_of(meta.reduce_fx)
        # a rank's part of a batch may have none of what a mean is of, and the mean of nothing is nan
        nothing = is_training and meta.is_mean_reduction and not batch_size
        repeats = self._repeats_hooks and not self.in_step and is_tensor and reduction.adds_up
        if not self.counts or nothing or repeats:
            batch_size = 0
            if is_tensor:
                dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
                value = torch.full_like(value, reduction.neutral, dtype=dtype)
        ResultCollection.update_metrics(results, key, value, batch_size)
        if meta.sync.rank_zero_only or meta.sync.group is not None:
            return
        if meta.on_step and self.counts:
            # even parts of a batch count alike, whatever Lightning takes for their size
            alike = is_training and not self._is_given and self._is_even()
            self._results.note_of_step(results, key, min(batch_size, 1) if alike else batch_size)
        if meta.on_epoch:
            self._results.note_of_epoch(results, key)
