"""The pace of a training while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback, ThroughputMonitor
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_dist.compat.lightning import AFTER_FETCH, BEFORE_FETCH, compute_dtype, throughputs_of
from lightning_dist.patches import Patches
from lightning_dist.pytree import tree_leaves
from lightning_dist.report.communication import StepProfile

TOKEN_IDS = ("input_ids", "inputs", "tokens")
"""Names of token ids in batches that are mappings."""


class Throughput(Callback):
    """Logs samples per second, tokens per second where batches hold token ids, the time of a step, the shares of it in
    which the training waits for its loader and for communication, and how much of the devices' peak it uses.

    Averaged since the last time that the logger wrote (``log_every_n_steps``); shown in the progress bar and sent to
    the loggers as ``samples_per_second``, ``tokens_per_second`` (over all data ranks), ``step_time`` (seconds),
    ``data_wait`` and ``communication_wait`` (from 0 to 1; as all that is logged, means over the data ranks, under
    ``pp`` over the stages too) and, with ``flops_per_sample``, ``mfu`` (model FLOPs utilisation, from 0 to 1, over all
    devices of the layout).

    ``data_wait`` is the share of the time in which the training asks its loader for a batch and has none yet. What
    comes between two steps besides (checkpoints, loggers, other callbacks, the batch's way to the device) is in
    ``step_time`` alone.

    Token ids are integers ``(batch, length)``; where a batch is a mapping, those named as :data:`TOKEN_IDS` has it.

    ``communication_wait`` is the share of the step's time in which a rank only communicates, or waits for a rank that
    has not come yet. What is sent while something is computed costs no time, and is not in it. It is told

    - on a CPU, under ``HybridStrategy`` over several ranks, of all steps: the thread that watches the run looks, up to
      fifty times a second, whether the one that trains is in a collective. Nothing is added to a step; a window of a
      second is within some percent;
    - on a CUDA GPU with ``communication_every_n_steps``, of one step in so many: torch.profiler's trace of the device
      has the time in which kernels of NCCL run and no other kernel does, also where the next one is late because the
      host is. Such a step begins with a barrier, waits for the device at its begin and its end, and takes longer; the
      other numbers leave it out. A step is not told where somebody else profiles.

    Args:
        flops_per_sample: floating point operations that the network takes for forward and backward of a sample, without
            what is computed again; Lightning's ``measure_flops`` counts them.
        peak_flops: most that one device can do in a second, in the precision that is used. Default: Lightning's table
            of devices.
        communication_every_n_steps: on a CUDA GPU, profile one optimizer step in so many for ``communication_wait``, on
            all ranks the same ones. Default: none, and it is not told there.

    Communication: a barrier for each step that is profiled. Every data rank is taken to see as many samples as this.

    Raises:
        ValueError: for ``communication_every_n_steps`` below 1; in ``setup``, for ``flops_per_sample`` on a device
            whose peak is not known.
    """

    def __init__(
        self,
        flops_per_sample: float | None = None,
        peak_flops: float | None = None,
        communication_every_n_steps: int | None = None,
    ) -> None:
        every = communication_every_n_steps
        if every is not None and (not isinstance(every, int) or every < 1):
            raise ValueError(
                f"Throughput(communication_every_n_steps={every!r}) is no number of steps; choose 1 or more, or None"
            )
        self.flops_per_sample, self.peak_flops = flops_per_sample, peak_flops
        self.communication_every_n_steps = every
        self._profile: StepProfile | None = None
        self._profile_begin = self._fetch_begin = 0.0
        self._patches = Patches()
        self._steps = 0
        self._reset()

    def _reset(self) -> None:
        self._start: float | None = None
        self._waited = 0.0
        self._communicated_before: float | None = None
        self._profiled: list[float] = []
        self._samples = self._tokens = self._batches = self._seen = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Looks up the device's peak, where it is needed; ends a profile that a fit left which failed."""
        device = trainer.strategy.root_device
        if self.flops_per_sample is not None and self.peak_flops is None:
            self.peak_flops = get_available_flops(device, compute_dtype(trainer.precision_plugin))
            if self.peak_flops is None:
                raise ValueError(
                    f"Throughput(flops_per_sample={self.flops_per_sample:g}): the peak of {device} is not known; pass "
                    "peak_flops="
                )
        self.on_validation_start(trainer, pl_module)
        profiles = self.communication_every_n_steps is not None and device.type == "cuda"
        self._profile = StepProfile(device, trainer.strategy.barrier) if profiles else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Is told from now on when Lightning asks the loader for a batch, and when it is there."""
        self._patches.undo()  # of a fit that failed
        self._patches.wrap(trainer.fit_loop.epoch_loop, BEFORE_FETCH, self._before_fetch)
        self._patches.wrap(trainer.fit_loop.epoch_loop, AFTER_FETCH, self._after_fetch)

    def _before_fetch(self, original: Callable[[], None]) -> None:
        original()
        self._fetch_begin = time.perf_counter()

    def _after_fetch(self, original: Callable[[], None]) -> None:
        if self._start is not None and not self._is_profiling:
            self._waited += time.perf_counter() - self._fetch_begin
        original()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock anew: evaluation between epochs does not count."""
        self._reset()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends a profile, which would be of the validation too."""
        if self._profile is not None:
            self._profile.stop()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends a profile, and leaves Lightning's loop as it was."""
        self.on_validation_start(trainer, pl_module)
        self._patches.undo()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves Lightning's loop as it was."""
        self._patches.undo()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock anew."""
        self._reset()

    @property
    def _is_profiling(self) -> bool:
        return self._profile is not None and self._profile.runs

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch; writes at the logger's pace. The first batch only starts the clock."""
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        profiled = self._is_profiling
        if profiled and ends_step:
            self._end_profile()
        if self._start is not None:
            self._seen += 1
            if not profiled:
                self._samples += extract_batch_size(batch)
                self._tokens += _num_tokens(batch)
                self._batches += 1
            every = getattr(trainer, "log_every_n_steps", 50) or 1
            if (self._seen % every == 0 or trainer.is_last_batch) and not self._is_profiling:
                for name, value in self._values(trainer, time.perf_counter() - self._start).items():
                    pl_module.log(name, value, prog_bar=True, on_step=True, on_epoch=False, batch_size=1)
                self._reset()
        if self._start is None:
            self._start, self._communicated_before = time.perf_counter(), _communicated(trainer)
        if ends_step and not trainer.is_last_batch:
            self._begin_profile()

    def _begin_profile(self) -> None:
        """Of the step that comes, where it is the turn of that one."""
        self._steps += 1
        if self._profile is not None and self._steps % (self.communication_every_n_steps or 1) == 0:
            self._profile_begin = time.perf_counter()
            self._profile.start()

    def _end_profile(self) -> None:
        """And takes the time of the step, and what the profile took, off the clock."""
        assert self._profile is not None
        share = self._profile.stop()
        if share is not None:
            self._profiled.append(share)
        if self._start is not None:
            self._start += time.perf_counter() - self._profile_begin

    def _values(self, trainer: pl.Trainer, elapsed: float) -> dict[str, float]:
        values = {} if not self._batches else self._rates(trainer, elapsed)
        if self._profiled:
            values["communication_wait"] = sum(self._profiled) / len(self._profiled)
        return values

    def _rates(self, trainer: pl.Trainer, elapsed: float) -> dict[str, float]:
        ranks = getattr(trainer.strategy, "num_data_ranks", trainer.world_size)
        samples_per_second = self._samples * ranks / elapsed
        values = {
            "samples_per_second": samples_per_second,
            "step_time": elapsed / self._batches * trainer.accumulate_grad_batches,
            "data_wait": self._waited / elapsed,
        }
        communicated = _communicated(trainer)
        if communicated is not None and self._communicated_before is not None:
            values["communication_wait"] = min((communicated - self._communicated_before) / elapsed, 1.0)
        if self._tokens:
            values["tokens_per_second"] = self._tokens * ranks / elapsed
        if self.flops_per_sample is not None:
            assert self.peak_flops is not None
            values["mfu"] = samples_per_second * self.flops_per_sample / (trainer.world_size * self.peak_flops)
        return values


def _communicated(trainer: pl.Trainer) -> float | None:
    """Seconds of this run in which a CPU was in collectives; None where nobody looks, and on other devices, whose host
    runs ahead.
    """
    strategy: Any = trainer.strategy
    parts = getattr(strategy, "parts", None)  # another strategy has none
    return parts.watching.waited if parts is not None and strategy.root_device.type == "cpu" else None


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
    """Elements of the first token ids ``(batch, length)`` of a batch, 0 where it has none."""
    tensors = (leaf for leaf in _unnamed_or_token_ids(batch) if isinstance(leaf, Tensor) and leaf.ndim == 2)
    return next((tensor.numel() for tensor in tensors if tensor.dtype in (torch.int64, torch.int32)), 0)


def _unnamed_or_token_ids(batch: Any) -> list[Any]:
    """The leaves, of tensors in mappings those alone that are named as token ids are: others are columns of a table."""
    if isinstance(batch, Mapping):
        batch = [value for name, value in batch.items() if name in TOKEN_IDS or not isinstance(value, Tensor)]
    if isinstance(batch, (list, tuple)):
        return [leaf for item in batch for leaf in _unnamed_or_token_ids(item)]
    return tree_leaves(batch)
