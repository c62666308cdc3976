"""The pace of a training while it runs."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_dist.pytree import tree_leaves


class Throughput(Callback):
    """Logs samples per second, tokens per second where batches hold token ids, and the time of a step.

    Over all data ranks, averaged since the last time that the logger wrote (``log_every_n_steps``); shown in the
    progress bar and sent to the loggers as ``samples_per_second``, ``tokens_per_second`` and ``step_time`` (seconds).

    Communication: none; every data rank is taken to see as many samples as this one.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start: float | None = None
        self._samples = self._tokens = self._batches = 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock anew: evaluation between epochs does not count."""
        self._reset()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock anew."""
        self._reset()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch; writes at the logger's pace. The first batch only starts the clock."""
        if self._start is None:
            self._start = time.perf_counter()
            return
        self._samples += extract_batch_size(batch)
        self._tokens += _num_tokens(batch)
        self._batches += 1
        every = getattr(trainer, "log_every_n_steps", 50) or 1
        if self._batches % every and not trainer.is_last_batch:
            return
        elapsed = time.perf_counter() - self._start
        ranks = getattr(trainer.strategy, "num_data_ranks", trainer.world_size)
        values = {
            "samples_per_second": self._samples * ranks / elapsed,
            "step_time": elapsed / self._batches * trainer.accumulate_grad_batches,
        }
        if self._tokens:
            values["tokens_per_second"] = self._tokens * ranks / elapsed
        for name, value in values.items():
            pl_module.log(name, value, prog_bar=True, on_step=True, on_epoch=False, batch_size=1)
        self._reset()
        self._start = time.perf_counter()


def _num_tokens(batch: Any) -> int:
    """Elements of the first tensor of integers with a batch and a sequence axis: token ids, where there are any."""
    tensors = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim == 2)
    return next((tensor.numel() for tensor in tensors if tensor.dtype in (torch.int64, torch.int32)), 0)
