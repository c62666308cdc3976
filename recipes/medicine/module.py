"""ScanClassifier: cross entropy, and what a diagnosis is measured by, of any network that tells classes of scans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from recipes.configured import ConfiguredModule
from recipes.medicine.metrics import class_metrics
from recipes.optimization import OptimizerFactory, SchedulerFactory


class ScanClassifier(ConfiguredModule):
    """Trains a classifier on batches of scans and labels, as :class:`~recipes.medicine.data.MedMNIST` has them.

    Logs ``train/loss`` by step, and by epoch, of ``val`` and ``test``, ``loss`` and what
    :func:`~recipes.medicine.metrics.class_metrics` has.

    Args:
        model: makes the network, scans ``(batch, channels, *size)`` to logits ``(batch, num_classes)``.
        optimizer: makes the optimizer of parameter groups.
        scheduler: makes the learning rate schedule of the optimizer and ``total_steps``; ``None`` for a fixed rate.
        num_classes: number of classes.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        *,
        num_classes: int,
    ) -> None:
        super().__init__(model, optimizer, scheduler)
        self.val_metrics, self.test_metrics = class_metrics(num_classes), class_metrics(num_classes)

    def forward(self, scans: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)`` of scans ``(batch, channels, *size)``."""
        return self.network(scans)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of a batch."""
        scans, labels = batch
        loss = F.cross_entropy(self(scans), labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Adds a batch to the metrics of validation."""
        self._evaluate("val", self.val_metrics, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Adds a batch to the metrics of the test."""
        self._evaluate("test", self.test_metrics, batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities ``(batch, num_classes)``; labels in the batch are left aside."""
        return self(batch if isinstance(batch, Tensor) else batch[0]).softmax(dim=-1)

    def _evaluate(self, stage: str, metrics: MetricCollection, batch: tuple[Tensor, Tensor]) -> None:
        scans, labels = batch
        logits = self(scans).float()
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        probabilities = logits.softmax(dim=-1)
        for name, metric in metrics.items():
            metric.update(probabilities, labels)
            self.log(f"{stage}/{name}", metric, prog_bar=name == "auc", batch_size=len(labels))
