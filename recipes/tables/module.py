"""RowClassifier: the probability of one of two classes, by any network over the columns of a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from recipes.configured import ConfiguredModule
from recipes.optimization import OptimizerFactory, SchedulerFactory

Batch = dict[str, Tensor]


class RowClassifier(ConfiguredModule):
    """Trains a network on batches of :class:`~recipes.tables.data.Rows` by the binary cross entropy.

    Logs ``train/loss`` by step, and by epoch, of ``val`` and ``test``, ``loss`` and what ``metrics`` has.

    Args:
        model: makes the network, from numbers ``(batch, num_numeric)`` and categories ``(batch, num_categorical)`` to
            logits ``(batch,)``. Called in ``configure_model``.
        optimizer: makes the optimizer of parameter groups.
        scheduler: makes the learning rate schedule of the optimizer and ``total_steps``; ``None`` for a fixed rate.
        metrics: makes what to measure the probabilities by.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        *,
        metrics: Callable[[], MetricCollection],
    ) -> None:
        super().__init__(model, optimizer, scheduler)
        self.val_metrics, self.test_metrics = metrics(), metrics()

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``(batch,)`` of the positive class."""
        return self.network(batch["numbers"], batch["categories"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy of a batch."""
        loss = F.binary_cross_entropy_with_logits(self(batch), batch["label"])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["label"]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the metrics of validation."""
        self._evaluate("val", self.val_metrics, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the metrics of the test."""
        self._evaluate("test", self.test_metrics, batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities ``(batch,)`` of the positive class."""
        return self(batch).sigmoid()

    def _evaluate(self, stage: str, metrics: MetricCollection, batch: Batch) -> None:
        logits, labels = self(batch).float(), batch["label"].float()
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        self.log(f"{stage}/loss", loss, batch_size=len(labels))
        probabilities, classes = logits.sigmoid(), labels.long()
        for name, metric in metrics.items():
            metric.update(probabilities, labels if name == "brier" else classes)
            self.log(f"{stage}/{name}", metric, prog_bar=name == "auc", batch_size=len(labels))
