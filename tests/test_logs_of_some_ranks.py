"""What only some ranks log, or log late, or of nothing: as in one process, and no rank waits for another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_dist import HybridStrategy
from tests.support import models
from tests.support.models import CLASSES, samples
from tests.support.parity import QUIET, Run, assert_parity, one_process
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def trainer(**arguments: Any) -> L.Trainer:
    L.seed_everything(1, verbose=False)
    strategy: Any = HybridStrategy(f"dp_replicate={world()}") if world() > 1 else "auto"
    return L.Trainer(**{**QUIET, "devices": world(), "strategy": strategy, "max_epochs": 1, **arguments})


def validated(module: type[L.LightningModule], count: int) -> dict[str, float]:
    runner = trainer()
    model = module()
    for _ in range(2):
        runner.validate(model, DataLoader(samples(count), batch_size=3), verbose=False)
    return {name: float(value) for name, value in runner.callback_metrics.items()}


def fitted(module: type[L.LightningModule], count: int = 64, **arguments: Any) -> L.Trainer:
    runner = trainer(**{"log_every_n_steps": 50, **arguments})
    runner.fit(module(), DataLoader(samples(count), batch_size=8 // world()))
    return runner


class Bare(models.Momentum):
    """Logs nothing by itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Any: ...


# ---------------------------------------------------------------- metrics


class OfRank0(Bare):
    """Rank 0 alone updates and logs; one process has the same rows, since they are seen twice as often there."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        if rank() == 0:
            for metric in (self.accuracy, self.auroc):
                metric.update(logits.softmax(-1), batch[1])
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
            self.log("auroc", self.auroc, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, batch[1])


def _of_rank_0() -> list[dict[str, float]]:
    epochs: list[dict[str, float]] = []

    class Note(Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    runner = trainer(max_epochs=3, callbacks=[Note()])
    runner.fit(OfRank0(), DataLoader(samples(32), batch_size=4))
    return epochs


def test_metrics_that_rank_0_alone_logs_are_alike_in_every_epoch() -> None:
    first, second = run_on_ranks(2, _of_rank_0, timeout=60)
    assert [set(epoch) for epoch in first] == [{"accuracy", "auroc"}] * 3
    assert first == second


class Collected(Bare):
    """A collection of metrics: states that are sums, and states that are lists of rows."""

    def __init__(self) -> None:
        super().__init__()
        kinds = (torchmetrics.Accuracy, torchmetrics.AUROC, torchmetrics.AveragePrecision)
        self.collected = torchmetrics.MetricCollection(
            {k.__name__: k("multiclass", num_classes=CLASSES) for k in kinds}
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.collected.update(self(batch[0]).softmax(-1), batch[1])
        self.log_dict(self.collected)


class Scalars(Bare):
    """Rows without a dim."""

    def __init__(self) -> None:
        super().__init__()
        self.losses = torchmetrics.CatMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.losses.update(F.cross_entropy(self(batch[0]), batch[1]))

    def on_validation_epoch_end(self) -> None:
        self.log("worst", torch.as_tensor(self.losses.compute()).max())
        self.losses.reset()


class InHooks(Bare):
    """A metric that hooks update, and values that they log."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torchmetrics.SumMetric()

    def on_validation_batch_start(self, batch: Any, *args: Any) -> None:
        self.log("started", float(len(batch[1])), reduce_fx="sum")

    def on_validation_batch_end(self, outputs: Any, batch: Any, *args: Any) -> None:
        self.total.update(len(batch[1]))
        self.log("total", self.total)


class Extremes(Bare):
    """The least and the most of the batches, of which one is not a number; and a name that rank 0 logs."""

    bad = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        is_bad = bool((batch[0][0] == samples(12)[self.bad][0]).all())
        value = torch.tensor(float("nan") if is_bad else 1.0)
        self.log("least", value, reduce_fx="min")
        self.log("most", value, reduce_fx="max")


class LaterExtremes(Extremes):
    bad = 3


class OfNothing(Bare):
    """A mean over the rows of a kind, of which a batch may have none."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        kind = batch[1] == 0
        self.log("first", losses[kind].mean(), batch_size=int(kind.sum()), on_step=True, on_epoch=True)


@pytest.mark.parametrize("count", [3, 9, 12])
@pytest.mark.parametrize("module", [Collected, Scalars, InHooks, Extremes, LaterExtremes, OfNothing])
def test_evaluation_equals_one_process(module: type[L.LightningModule], count: int) -> None:
    one = validated(module, count)
    assert one
    for other in run_on_ranks(2, validated, module, count, timeout=60):
        assert other == pytest.approx(one, rel=1e-5, nan_ok=True)


class Shared(Bare):
    """One metric over two loaders."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.val_accuracy.update(self(batch[0]), batch[1])
        self.log("shared", self.val_accuracy)


def _two_loaders() -> dict[str, float]:
    runner = trainer()
    loaders = [DataLoader(samples(12), batch_size=3), DataLoader(samples(3), batch_size=3)]
    runner.validate(Shared(), loaders, verbose=False)
    return {name: float(value) for name, value in runner.callback_metrics.items()}


def test_one_metric_over_two_loaders_equals_one_process() -> None:
    one = _two_loaders()
    assert run_on_ranks(2, _two_loaders, timeout=60) == [pytest.approx(one)] * 2


# ---------------------------------------------------------------- steps


class Rows(Logger):
    name = version = "rows"  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({name: float(value) for name, value in metrics.items()})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Constant(Bare):
    """Logs the same of every batch, reduced by Lightning's flag and without it."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("flagged", torch.tensor(4.0), on_step=True, on_epoch=True, sync_dist=True)
        self.log("plain", torch.tensor(4.0), on_step=True, on_epoch=True)


def _written() -> list[dict[str, float]]:
    rows = Rows()
    trainer(logger=rows).validate(Constant(), DataLoader(samples(9), batch_size=3), verbose=False)
    return rows.rows


def test_a_batch_that_is_repeated_changes_no_step_value() -> None:
    rows, _ = run_on_ranks(2, _written, timeout=60)
    values = {name: {row[name] for row in rows if name in row} for row in rows for name in row if name != "epoch"}
    assert set(values) == {"flagged_step", "plain_step", "flagged_epoch", "plain_epoch"}
    assert set().union(*values.values()) == {4.0}


class WithArrays(Bare):
    """Counts in one array of its own; another it only reads, and the last lies in a file."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.counted, self.fixed = np.zeros(1), np.arange(3.0)
        self.fixed.flags.writeable = False
        self.mapped = np.memmap(file, dtype=np.uint8, mode="r")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.counted += len(batch[0])
        self.log("mean", float(self.fixed.mean() + self.mapped[0]))


def _counted(file: str) -> list[float]:
    module = WithArrays(file)
    trainer().validate(module, DataLoader(samples(9), batch_size=3), verbose=False)
    return [float(module.counted[0]), float(module.trainer.callback_metrics["mean"])]


def test_a_batch_that_is_repeated_leaves_arrays_that_are_only_read(tmp_path: Path) -> None:
    (tmp_path / "mapped").write_bytes(bytes([7] * 64))
    assert run_on_ranks(2, _counted, str(tmp_path / "mapped"), timeout=60) == [[6.0, 8.0], [3.0, 8.0]]


class Uneven(IterableDataset):
    """More samples on rank 0 than on the others."""

    def __iter__(self) -> Any:
        rows = samples(15)
        return iter([rows[i] for i in (range(9) if rank() == 0 else range(9, 15))])


class Sizes(Bare):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("rows", float(len(batch[0])), reduce_fx="sum", on_step=True, on_epoch=True)


def _uneven() -> float:
    runner = trainer()
    runner.validate(Sizes(), DataLoader(Uneven(), batch_size=3), verbose=False)
    return float(runner.callback_metrics["rows"])


def test_iterables_of_different_length_are_evaluated_to_their_ends() -> None:
    assert run_on_ranks(2, _uneven, timeout=60) == [15.0, 15.0]


# ---------------------------------------------------------------- decisions


class ByStepAccuracy(Bare):
    """A schedule that follows a metric's step value."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("now", self.accuracy, on_step=True, on_epoch=False)
        return F.cross_entropy(logits, batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.3)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
        config = {"scheduler": schedule, "monitor": "now", "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def _rate() -> tuple[float, float]:
    runner = fitted(ByStepAccuracy)
    weights = sum(float(p.detach().abs().sum()) for p in runner.lightning_module.parameters())
    return runner.optimizers[0].param_groups[0]["lr"], weights


def test_schedules_that_follow_a_metrics_step_value_stay_together() -> None:
    first, second = run_on_ranks(2, _rate, timeout=60)
    assert first[0] < 0.3
    assert first == second


class Late(Bare):
    """Logs what is monitored only at some steps, the first time late."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx % 3 == 2:
            self.log("late", loss)
        return loss


class AfterBackward(Bare):
    def on_after_backward(self) -> None:
        self.log("late", float(rank() + 1))


class ByCallback(Callback):
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        pl_module.log("late", outputs["loss"], on_step=True, on_epoch=False)


def _best(folder: Path, module: type[L.LightningModule], callbacks: list[Callback]) -> float:
    best = ModelCheckpoint(folder, monitor="late", every_n_train_steps=3, save_top_k=1)
    fitted(module, callbacks=[*callbacks, best], enable_checkpointing=True)
    assert best.best_model_score is not None
    return float(best.best_model_score)


@pytest.mark.parametrize(
    ("module", "callbacks"), [(Late, []), (AfterBackward, []), (Bare, [ByCallback()])], ids=["late", "hook", "callback"]
)
def test_checkpoints_by_a_step_value_are_alike(tmp_path: Path, module: Any, callbacks: list[Callback]) -> None:
    first, second = run_on_ranks(2, _best, tmp_path, module, callbacks, timeout=60)
    assert first == second


class Named(Bare):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train", loss)
        return loss


def _file_name(folder: Path) -> tuple[str, list[str]]:
    best = ModelCheckpoint(folder, filename="{epoch}-{train:.4f}")
    fitted(Named, callbacks=[best], enable_checkpointing=True, strategy=HybridStrategy("dp_shard=2"))
    return os.path.basename(best.best_model_path), os.listdir(folder)


def test_ranks_agree_on_a_file_named_by_a_step_value(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, _file_name, tmp_path, timeout=60)
    assert first == second
    assert first[1] == [first[0]]


class AtEpochEnd(Callback):
    """Logs after the module's own hooks, for the progress bar."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("end", float(rank() + 1), sync_dist=True, prog_bar=True)


def _shown() -> float:
    return float(fitted(Bare, callbacks=[AtEpochEnd()], enable_progress_bar=True).callback_metrics["end"])


def test_a_progress_bar_reads_what_a_callback_logs_for_all_ranks() -> None:
    assert run_on_ranks(2, _shown, timeout=60) == [1.5, 1.5]


def test_a_users_own_method_of_a_callback_is_left_in_place(tmp_path: Path) -> None:
    assert run_on_ranks(2, _own_method, tmp_path, timeout=60) == [(1, True)] * 2


def _own_method(folder: Path) -> tuple[int, bool]:
    calls: list[int] = []
    callback = ModelCheckpoint(folder)
    callback.on_train_epoch_end = lambda *_: calls.append(1)  # type: ignore[method-assign]
    fitted(Bare, callbacks=[callback], enable_checkpointing=True)
    return len(calls), "on_train_epoch_end" in vars(callback)


class OfKind(Bare):
    """A mean over the rows of a kind: every global batch has some, not every rank's part of it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        kind = batch[0][:, 0] > 0
        self.log("positive", losses[kind].mean(), batch_size=int(kind.sum()), on_step=False, on_epoch=True)
        return losses.mean()


def test_a_rank_without_rows_adds_nothing_to_a_mean() -> None:
    one = one_process(Run(OfKind, models.sorted_samples))
    assert one.logged["positive"] == one.logged["positive"]
    assert_parity(Run(OfKind, models.sorted_samples), "dp_replicate=2", 2)


class Sometimes(Bare):
    """A value that rank 0 alone logs without a batch size beside one of all ranks."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if rank() == 0:
            self.log("extra", 1.0, on_step=False, on_epoch=True)
        loss: Tensor = super().training_step(batch, batch_idx)
        self.log("train", loss)
        return loss


def test_step_values_weigh_the_ranks_alike_whatever_else_they_log() -> None:
    assert_parity(Run(Sometimes, samples), "dp_replicate=2", 2)
