"""Logged values, and who reads them."""

from __future__ import annotations

from typing import Any

import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F

from tests.user_code.case import Case, evaluated
from tests.user_code.networks import Classifier
from tests.user_code.samples import CLASSES


class Reader(Callback):
    """Only reads, in every step."""

    def __init__(self, where: str = "callback_metrics") -> None:
        self.where, self.seen = where, []  # type: ignore[var-annotated]

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.seen += [float(value) for _, value in sorted(getattr(trainer, self.where).items())]


class Synced(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True, prog_bar=True)
        return loss


class ManyLogs(Classifier):
    """By step and epoch, sums and extremes, and a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("most", logits.max(), on_step=False, on_epoch=True, reduce_fx="max")
        self.log("count", float(len(logits)), on_step=False, on_epoch=True, reduce_fx="sum")
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss


class OwnAverage(Classifier):
    """Keeps losses of steps in a list, and logs their mean at the end of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("mean", torch.stack(self.losses).mean())


class CollectedOutputs(Classifier):
    """The migration guide's pattern: outputs of validation in a list, a number of all of them at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[tuple[Tensor, Tensor]] = []
        self.seen: list[float] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.outputs.append((self(batch[0]), batch[1]))

    def on_validation_epoch_end(self) -> None:
        logits, y = (torch.cat(column) for column in zip(*self.outputs, strict=True))
        self.outputs.clear()
        # sums: a mean of ranks' means would weigh ranks with fewer rows as much
        self.log("val_correct", (logits.argmax(1) == y).double().sum(), reduce_fx="sum")
        self.log("val_rows", float(len(y)), reduce_fx="sum")


class GatheredOutputs(CollectedOutputs):
    """The same, gathered by hand; the number of rows is seen too."""

    def on_validation_epoch_end(self) -> None:
        logits, y = (torch.cat(column) for column in zip(*self.outputs, strict=True))
        self.outputs.clear()
        logits, y = self.all_gather(logits).reshape(-1, CLASSES), self.all_gather(y).reshape(-1)
        self.seen.append(float(len(y)))
        self.log("val_accuracy", (logits.argmax(1) == y).double().mean())


class Tabular(Classifier):
    """AUROC and F1 of validation as objects, average precision by hand in the epoch's end."""

    def __init__(self) -> None:
        super().__init__()
        self.auroc = torchmetrics.AUROC("multiclass", num_classes=CLASSES)
        self.scores = torchmetrics.MetricCollection(
            {
                "f1": torchmetrics.F1Score("multiclass", num_classes=CLASSES),
                "kappa": torchmetrics.CohenKappa("multiclass", num_classes=CLASSES),
            }
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        probabilities = self(batch[0]).softmax(1)
        self.auroc.update(probabilities, batch[1])
        self.log("auroc", self.auroc)
        self.scores.update(probabilities, batch[1])

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.scores.compute())
        self.scores.reset()


class LoggedDifference(Classifier):
    """Logs a number computed from weights and one from states of the optimizer, as tensors."""

    def on_train_batch_end(self, *args: Any) -> None:
        first, last = self.net.blocks[0].mlp.fc1.weight, self.net.blocks[1].mlp.fc1.weight
        self.log("distance", F.mse_loss(first, last))
        optimizer: Any = self.optimizers()
        self.log("momentum", optimizer.state[first]["momentum_buffer"].norm())


class StopsItself(Classifier):
    """Ends the training by a logged value."""

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.callback_metrics["loss"] < 1.4:
            self.trainer.should_stop = True


CASES = [
    Case("callback_metrics_read", Classifier, callbacks=lambda: [Reader()]),
    Case("callback_metrics_read_sync_dist", Synced, callbacks=lambda: [Reader()]),
    Case("logged_metrics_read", Classifier, callbacks=lambda: [Reader("logged_metrics")]),
    Case("progress_bar_metrics_read", Synced, callbacks=lambda: [Reader("progress_bar_metrics")]),
    Case("many_logs", ManyLogs, val=evaluated, trainer={"max_epochs": 2}),
    Case("own_average_of_losses", OwnAverage, trainer={"max_epochs": 2}),
    Case("outputs_collected", CollectedOutputs, val=lambda _: evaluated(0, count=20)),
    Case(
        "outputs_gathered",
        GatheredOutputs,
        val=lambda _: evaluated(0, count=16),
        note="of a set that divides by the ranks: ranks that gather need as many rows each",
    ),
    Case("tabular_auroc", Tabular, val=evaluated, trainer={"max_epochs": 2}),
    Case("values_of_weights_logged", LoggedDifference),
    Case("stops_by_logged_value", StopsItself, trainer={"max_epochs": 3}),
]
