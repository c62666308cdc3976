"""The batch of an optimizer step, kept where a run goes on with another number of data ranks than it began with.

[Note: what Lightning counts]
A user writes ``batch_size``, ``accumulate_grad_batches`` and limits for the ranks that a run begins with. With half as
many data ranks, each step takes twice as many batches, and all that Lightning counts in batches (``batch_idx``,
``limit_train_batches``, ``val_check_interval``, the ``frequency`` of a scheduler by steps) is multiplied by two on the
Trainer, for the length of the run. What it counts in optimizer steps (``global_step``, ``max_steps``, a checkpoint's
``every_n_train_steps``, ``log_every_n_steps``) stays as it is.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from lightning_dist.compat import lightning as private
from lightning_dist.data import Division, can_be_divided, distributed_sampler, divide, divided, items_of_batch
from lightning_dist.patches import Patches
from lightning_dist.ranks import LayoutRanks


class GlobalBatch:
    """Divides a step's batch over the data ranks that are there; see [Note: what Lightning counts].

    Communication: none.
    """

    def __init__(self, ranks: LayoutRanks) -> None:
        self._ranks = ranks
        self._trainer: Any = None
        self._patches = Patches()
        self.division: Division | None = None
        """Of this run's training loaders, once one is there; None for a run on the ranks that it began with."""
        self._adapted: list[Any] = []
        """Schedulers of this run whose frequency is by the batches that there are."""

    def attach(self, trainer: pl.Trainer, patches: Patches) -> None:
        """A run begins. Where batches keep their size, the Trainer's counts are right from here on."""
        self._trainer, self._patches = trainer, patches
        self.division, self._adapted = None, []
        if self._changes and trainer.state.fn == TrainerFn.FITTING:
            times = Fraction(self._first, self._ranks.num_data_ranks)
            if all((times * number).denominator == 1 for number in self._accumulated) and not self._is_manual:
                self._divide(1, is_fixed=True)

    @property
    def _first(self) -> int:
        return self._ranks.first_data_ranks or self._ranks.num_data_ranks

    @property
    def _changes(self) -> bool:
        return self._first != self._ranks.num_data_ranks

    @property
    def _is_manual(self) -> bool:
        return not self._trainer.lightning_module.automatic_optimization

    @property
    def _scheduler(self) -> GradientAccumulationScheduler | None:
        callbacks = (c for c in self._trainer.callbacks if isinstance(c, GradientAccumulationScheduler))
        return next(callbacks, None)

    @property
    def _accumulated(self) -> list[int]:
        scheduler = self._scheduler
        return [self._trainer.accumulate_grad_batches] if scheduler is None else [*scheduler.scheduling.values()]

    def divided(self, loader: DataLoader) -> DataLoader:
        """A training loader whose samples are sharded, with batches of the size that keeps the step's batch.

        Raises:
            ValueError: there is none, or another loader of this run has another.
        """
        if not self._changes:
            return loader
        if self.division is None or self.division.first_size != items_of_batch(loader):
            self._divide(items_of_batch(loader), is_fixed=not can_be_divided(loader))
        assert self.division is not None
        return divided(loader, self.division)

    def take(self, loader: object) -> None:
        """A training loader is there, which may be one that its owner shards; raises as :meth:`divided`."""
        if self._changes and distributed_sampler(loader) is None:
            self._divide(items_of_batch(loader), is_fixed=True)

    def _divide(self, size: int, is_fixed: bool) -> None:
        first, now, before = self._first, self._ranks.num_data_ranks, self.division
        if before is not None:
            # the Trainer accumulates as that says
            self.division = Division(first, now, size, math.ceil(Fraction(size * first, now) / before.ratio))
            if self.division.ratio != before.ratio or (is_fixed and self.division.batch_size != size):
                raise ValueError(
                    f"training loaders with batches of {before.first_size} and of {size} can't both keep them on {now} "
                    f"data ranks, where the run began with {first}; choose sizes of which both can be divided"
                )
            return
        self.division = divide(size, first, now, () if self._is_manual else self._accumulated, is_fixed)
        self._adapt(self.division.ratio)
        rank_zero_info(
            f"The run began with {first} data ranks and goes on with {now}: each step's batch is the same, "
            f"over {self.division.ratio} times as many batches"
        )

    def _adapt(self, ratio: Fraction) -> None:
        """The Trainer's counts of batches, for the length of the run."""
        trainer, scheduler = self._trainer, self._scheduler
        limits = {name: self._times(name, getattr(trainer, name), ratio) for name in _COUNTS}
        if scheduler is not None:
            times = {epoch: int(number * ratio) for epoch, number in scheduler.scheduling.items()}
            self._patches.set(scheduler, "scheduling", times)
        else:
            self._patches.set(trainer, "accumulate_grad_batches", int(trainer.accumulate_grad_batches * ratio))
        for name, limit in limits.items():
            self._patches.set(trainer, name, limit)

    def _times(self, name: str, count: Any, ratio: Fraction) -> Any:
        """A count of batches, or a share of the epoch, by the ratio."""
        if isinstance(count, int) and (count * ratio).denominator == 1:
            return int(count * ratio)
        is_share = isinstance(count, float) and name != "limit_train_batches" and ratio.denominator == 1
        is_all = isinstance(count, float) and count == 1
        if is_all or is_share or not isinstance(count, (int, float)):
            return count
        raise ValueError(
            f"Trainer({name}={count}) is of the batches of the ranks that the run began with; with "
            f"{self._ranks.num_data_ranks} data ranks a step has {ratio} times as many, and that is no whole number of "
            f"them: choose a multiple of {ratio.denominator} batches"
        )

    def after_data(self) -> None:
        """Lightning has set up the training loaders, and said after which batches it validates."""
        division, trainer = self.division, self._trainer
        if division is None:
            return
        ratio, interval = division.ratio, trainer.val_check_interval
        if isinstance(interval, float) and interval < 1 and math.isfinite(trainer.num_training_batches):
            at_first = math.ceil(trainer.num_training_batches / ratio)
            trainer.val_check_batch = max(1, int(at_first * interval)) * int(ratio)
        for config in trainer.lr_scheduler_configs:
            is_new = not any(config is adapted for adapted in self._adapted)
            if is_new and config.interval == "step" and config.frequency > 1:
                config.frequency = self._frequency(config.frequency, ratio)
                self._adapted.append(config)

    def _frequency(self, frequency: int, ratio: Fraction) -> int:
        """Of a scheduler by steps, which Lightning counts in batches, at optimizer steps alone (seen in 2.6.6)."""
        if (frequency * ratio).denominator == 1:
            return int(frequency * ratio)
        times = math.gcd(*self._accumulated)
        return times * int(frequency / math.gcd(int(times / ratio), frequency))

    def on_train_start(self) -> None:
        """A run that goes on within an epoch accumulates as that epoch does, which Lightning says at its start only."""
        if (scheduler := self._scheduler) is not None and private.goes_on(self._trainer.fit_loop):
            times = scheduler.get_accumulate_grad_batches(self._trainer.current_epoch)
            self._trainer.accumulate_grad_batches = times


_COUNTS = ("limit_train_batches", "val_check_interval")
