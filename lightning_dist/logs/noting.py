"""What a module logs on this rank, noted with the weight that it has beside what other ranks log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.tensor import DTensor

from lightning_dist.compat import lightning as private
from lightning_dist.compat.lightning import EXTRACT_BATCH_SIZE, Metadata, ResultCollection
from lightning_dist.logs.reductions import reduction_of
from lightning_dist.logs.results import ReducedResults
from lightning_dist.patches import Patches
from lightning_dist.placeholder import is_placeholder


def to_tensor(device: torch.device, value: Any, name: str) -> torch.Tensor:
    """In place of the method by which ``log`` takes a number: it drops its dims, which a divided number must not have.

    Communication: of a parameter of one element, an all-gather of it.
    """
    if isinstance(value, DTensor) and value.ndim and value.numel() == 1:
        value = value.full_tensor().detach()
    return private.logged_tensor(device, value, name)


def whole(results: ResultCollection, key: str, value: Any) -> Any:
    """The value as a plain tensor; None of a tensor that another stage of a pipeline holds.

    Communication: of a ``DTensor``, which all ranks of its mesh log, an all-reduce of one number per axis that it is
    divided over.

    Raises:
        ValueError: if one is logged with ``rank_zero_only=True``, as its other parts would be missing.
    """
    if is_placeholder(value):
        results[key].has_reset = True  # as if it had not been logged here
        return None
    if not isinstance(value, DTensor):
        return value
    meta = results[key].meta
    if meta.sync.rank_zero_only:
        raise ValueError(
            f"self.log({meta.name!r}, ..., rank_zero_only=True) got a number of which every rank holds a part: log it "
            "on every rank, or the number of value.full_tensor(), which every rank has to call"
        )
    return value.full_tensor()


class NotedLogs:
    """Wraps the methods by which Lightning takes what is logged, and notes it for ``results`` instead of reducing it.

    Args:
        trainer, results, is_even: see :class:`~lightning_dist.logs.StepLogs`.
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
                self._size = 1
                with suppress(RecursionError):  # as Lightning finds it where it weights by it
                    self._size = next((s for s in private.sizes_in_batch(results.batch) if s is not None), 1)
            return self._size
        return getattr(ResultCollection, EXTRACT_BATCH_SIZE)(results, value, batch_size, meta)

    def _update(self, results: ResultCollection, key: str, value: Any, batch_size: int) -> None:
        meta, is_tensor = results[key].meta, results[key].is_tensor
        value = whole(results, key, value)
        if value is None:
            return
        if meta.sync.group is None:
            private.leave_unreduced(meta)
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
