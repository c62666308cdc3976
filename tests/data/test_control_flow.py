"""What one rank decides of a training's course: all do it, or all end with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tests.data.strategies import layouts, strategy_of
from tests.support import models
from tests.support.parity import QUIET, Run, assert_parity, once, whole_weights
from tests.support.ranks import RankError, run_on_ranks

pytestmark = pytest.mark.sampled

HOOKS = ["on_train_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_epoch_start"]


class StopsOnLastRank(Callback):
    """Says so in a hook, on the last rank only; in one process, which is its own last rank."""

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def _stop(self, trainer: L.Trainer, hook: str) -> None:
        if hook == self.hook and trainer.global_rank == trainer.world_size - 1 and trainer.global_step >= 2:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._stop(trainer, "on_train_batch_end")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._stop(trainer, "on_validation_end")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._stop(trainer, "on_train_epoch_end")

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._stop(trainer, "on_train_epoch_start")


def fit(layout: str | None, hook: str) -> tuple[int, int, dict[str, float]]:
    L.seed_everything(1, verbose=False)
    world = torch.distributed.get_world_size() if layout else 1
    trainer = L.Trainer(
        **QUIET,
        devices=world,
        strategy=strategy_of(layout),
        max_epochs=3,
        val_check_interval=3,
        callbacks=[StopsOnLastRank(hook)],
    )
    ranks = trainer.strategy.num_data_ranks if layout else 1  # type: ignore[attr-defined]
    trainer.fit(
        models.Classifier(),
        DataLoader(models.samples(32), batch_size=8 // ranks),
        DataLoader(models.samples(16), batch_size=4),
    )
    return trainer.global_step, trainer.current_epoch, {k: float(v) for k, v in trainer.callback_metrics.items()}


@pytest.mark.parametrize(("layout", "num_ranks"), layouts("dp_replicate=2", "tp=2"))
@pytest.mark.parametrize(
    "hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_epoch_start"]
)
def test_a_stop_on_one_rank_stops_all_where_it_stops_one_process(layout: str, num_ranks: int, hook: str) -> None:
    steps, epochs, logged = once(fit, None, hook)
    for rank in run_on_ranks(num_ranks, fit, layout, hook):
        assert rank[:2] == (steps, epochs)
        assert rank[2] == pytest.approx(logged, rel=1e-4)


class SkipsSomeSteps(models.Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in (1, 2, 5) else loss


@pytest.mark.parametrize(("layout", "num_ranks"), layouts("dp_replicate=2", "dp_shard=2"))
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_step_that_all_ranks_skip_is_as_in_one_process(layout: str, num_ranks: int, accumulate: int) -> None:
    one = once(train_skipping, None, accumulate)
    for rank in run_on_ranks(num_ranks, train_skipping, layout, accumulate):
        for name, weight in one.items():
            torch.testing.assert_close(rank[name], weight, rtol=1e-5, atol=1e-6)


def train_skipping(layout: str | None, accumulate: int) -> dict[str, Tensor]:
    L.seed_everything(1, verbose=False)
    world = torch.distributed.get_world_size() if layout else 1
    trainer = L.Trainer(
        **QUIET,
        devices=world,
        strategy=strategy_of(layout),
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1,
    )
    ranks = trainer.strategy.num_data_ranks if layout else 1  # type: ignore[attr-defined]
    module = SkipsSomeSteps()
    trainer.fit(module, DataLoader(models.samples(64), batch_size=8 // ranks))
    return whole_weights(module)


class SkipsOnOneRank(models.Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 and self.global_rank == 1 else loss


class LeavesOnOneRank(models.Classifier):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 1 and self.global_rank == 1 else None


class EndsOnOneRank(models.Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 1 and self.global_rank == 1:
            raise StopIteration
        return super().training_step(batch, batch_idx)


def fit_apart(module: type[L.LightningModule], layout: str) -> None:
    trainer = L.Trainer(**QUIET, devices=2, strategy=strategy_of(layout, timeout=timedelta(seconds=3)), max_epochs=1)
    trainer.fit(module(), DataLoader(models.samples(32), batch_size=4))


@pytest.mark.parametrize(
    "layout",
    ["dp_replicate=2", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("dp_shard=2", "tp=2"))],
)
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (SkipsOnOneRank, "training_step returned None on this rank"),
        (LeavesOnOneRank, "this rank left an epoch that other ranks go on with"),
        (EndsOnOneRank, "this rank left an epoch that other ranks go on with"),
    ],
)
def test_a_step_that_one_rank_skips_ends_all_with_the_reason(module: Any, message: str, layout: str) -> None:
    with pytest.raises(RankError) as error:
        run_on_ranks(2, fit_apart, module, layout)
    assert str(error.value).count(message) >= 2  # rank 1 raises it; rank 0, whose collective broke, is told


class Leaves(models.Classifier):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 else None


def test_an_epoch_that_all_ranks_leave_is_as_in_one_process() -> None:
    for layout in ("dp_replicate=2", "dp_shard=2"):
        assert_parity(Run(module=Leaves, data=models.samples, trainer={"max_epochs": 2}), layout, 2)


class OfUnequalLength(IterableDataset):  # type: ignore[type-arg]
    """Sharded by its owner, and not evenly."""

    def __iter__(self) -> Iterator[Any]:
        rank = torch.distributed.get_rank()
        samples: Any = models.samples(40)
        yield from (samples[index] for index in range(rank * 20, rank * 20 + (12 if rank else 20)))


def fit_unequal(layout: str, accumulate: int) -> tuple[int, int]:
    trainer = L.Trainer(
        **QUIET, devices=2, strategy=strategy_of(layout), max_epochs=2, accumulate_grad_batches=accumulate
    )
    module = models.Classifier()
    trainer.fit(module, DataLoader(OfUnequalLength(), batch_size=4), DataLoader(models.samples(8), batch_size=4))
    return trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.total.completed


@pytest.mark.parametrize("layout", ["dp_replicate=2", "dp_shard=2"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_loaders_of_unequal_length_end_an_epoch_together(layout: str, accumulate: int) -> None:
    steps = {1: 6, 2: 4}[accumulate]
    assert run_on_ranks(2, fit_unequal, layout, accumulate) == [(steps, 6), (steps, 6)]
