"""The pace of a training while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback, ThroughputMonitor
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_dist.compat.lightning import compute_dtype, throughputs_of
from lightning_dist.patches import Patches
from lightning_dist.pytree import tree_leaves


class Throughput(Callback):
    """Logs samples per second, tokens per second where batches hold token ids, the time of a step, the share of it that
    the training waits for its loader, and how much of what the devices could compute it uses.

    Over all data ranks, averaged since the last time that the logger wrote (``log_every_n_steps``); shown in the
    progress bar and sent to the loggers as ``samples_per_second``, ``tokens_per_second``, ``step_time`` (seconds),
    ``data_wait`` (of the first rank, from 0 to 1) and, with ``flops_per_sample``, ``mfu`` (model FLOPs utilisation,
    from 0 to 1, over all devices of the layout).

    Args:
        flops_per_sample: floating point operations that the network takes for forward and backward of a sample, without
            what is computed again; Lightning's ``measure_flops`` counts them.
        peak_flops: most that one device can do in a second, in the precision that is used. Default: Lightning's table
            of devices.

    Communication: none; every data rank is taken to see as many samples as this one.

    Raises:
        ValueError: in ``setup``, for ``flops_per_sample`` on a device whose peak is not known.
    """

    def __init__(self, flops_per_sample: float | None = None, peak_flops: float | None = None) -> None:
        self.flops_per_sample, self.peak_flops = flops_per_sample, peak_flops
        self._reset()

    def _reset(self) -> None:
        self._start: float | None = None
        self._waits_since: float | None = None
        self._waited = 0.0
        self._samples = self._tokens = self._batches = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Looks up the device's peak, where it is needed."""
        device = trainer.strategy.root_device
        if self.flops_per_sample is not None and self.peak_flops is None:
            self.peak_flops = get_available_flops(device, compute_dtype(trainer.precision_plugin))
            if self.peak_flops is None:
                raise ValueError(
                    f"Throughput(flops_per_sample={self.flops_per_sample:g}): the peak of {device} is not known; pass "
                    "peak_flops="
                )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock anew: evaluation between epochs does not count."""
        self._reset()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock anew."""
        self._reset()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is there."""
        if self._waits_since is not None:
            self._waited += time.perf_counter() - self._waits_since

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch; writes at the logger's pace. The first batch only starts the clock."""
        if self._start is not None:
            self._samples += extract_batch_size(batch)
            self._tokens += _num_tokens(batch)
            self._batches += 1
            every = getattr(trainer, "log_every_n_steps", 50) or 1
            if self._batches % every == 0 or trainer.is_last_batch:
                for name, value in self._values(trainer, time.perf_counter() - self._start).items():
                    pl_module.log(name, value, prog_bar=True, on_step=True, on_epoch=False, batch_size=1)
                self._reset()
        self._waits_since = time.perf_counter()
        self._start = self._start or self._waits_since

    def _values(self, trainer: pl.Trainer, elapsed: float) -> dict[str, float]:
        ranks = getattr(trainer.strategy, "num_data_ranks", trainer.world_size)
        samples_per_second = self._samples * ranks / elapsed
        values = {
            "samples_per_second": samples_per_second,
            "step_time": elapsed / self._batches * trainer.accumulate_grad_batches,
            "data_wait": self._waited / elapsed,
        }
        if self._tokens:
            values["tokens_per_second"] = self._tokens * ranks / elapsed
        if self.flops_per_sample is not None:
            assert self.peak_flops is not None
            values["mfu"] = samples_per_second * self.flops_per_sample / (trainer.world_size * self.peak_flops)
        return values


def count_samples_once(trainer: pl.Trainer, num_data_ranks: int, patches: Patches) -> None:
    """Has Lightning's ``ThroughputMonitor`` count the samples of data ranks, where others see the same ones, and take
    the operations of a batch for those of all ranks that share it.
    """
    world_size = trainer.world_size
    if num_data_ranks == world_size:
        return
    for monitor in (callback for callback in trainer.callbacks if isinstance(callback, ThroughputMonitor)):  # type: ignore[attr-defined]
        for rates in throughputs_of(monitor):
            patches.set(rates, "world_size", num_data_ranks)
            prefix = f"device{rates.separator}"
            patches.wrap(rates, "compute", partial(_of_layout, prefix, num_data_ranks, world_size))


def _of_layout(prefix: str, num_data_ranks: int, world_size: int, own: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What Lightning computes for a device that is alone with its samples, for one of those that share them."""
    metrics = own()
    for name in [name for name in metrics if name.startswith(prefix)]:
        of_all = metrics[name] * num_data_ranks
        if name != f"{prefix}mfu":
            metrics[name.removeprefix(prefix)] = of_all
        metrics[name] = of_all / world_size
    return metrics


def _num_tokens(batch: Any) -> int:
    """Elements of the first tensor of integers with a batch and a sequence axis: token ids, where there are any."""
    tensors = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim == 2)
    return next((tensor.numel() for tensor in tensors if tensor.dtype in (torch.int64, torch.int32)), 0)
