"""CreditScorer: the probability that an applicant is bad, by any network over the columns of a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MetricCollection

from recipes.credit_risk.metrics import credit_metrics
from recipes.optimization import (
    OptimizerFactory,
    SchedulerFactory,
    configure_optimization,
    parameters_without_decay,
)

Batch = dict[str, Tensor]


class CreditScorer(L.LightningModule):
    """Trains a network on batches of :class:`~recipes.credit_risk.data.Applicants` by the binary cross entropy.

    Logs ``train/loss`` by step, and by epoch, of ``val`` and ``test``, ``loss`` and what
    :func:`~recipes.credit_risk.metrics.credit_metrics` has.

    Args:
        model: makes the network, from numbers ``(batch, num_numeric)`` and categories ``(batch, num_categorical)`` to
            logits ``(batch,)``. Called in ``configure_model``.
        optimizer: makes the optimizer of parameter groups.
        scheduler: makes the learning rate schedule of the optimizer and ``total_steps``; ``None`` for a fixed rate.
        cost_of_bad: of a credit given to a bad applicant, in costs of one that is refused to a good one.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        *,
        cost_of_bad: float = 5.0,
    ) -> None:
        super().__init__()
        self._make_model, self._make_optimizer, self._make_scheduler = model, optimizer, scheduler
        self.model: nn.Module | None = None
        self.val_metrics, self.test_metrics = credit_metrics(cost_of_bad), credit_metrics(cost_of_bad)

    def configure_model(self) -> None:
        """Builds the network, once: Lightning calls this for every fit, validate, test and predict."""
        if self.model is None:
            self.model = self._make_model()
            self._without_decay = parameters_without_decay(self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer without weight decay on norms and biases, schedule by step."""
        return configure_optimization(self, self._make_optimizer, self._make_scheduler, self._without_decay)

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``(batch,)`` of bad applicants."""
        assert self.model is not None, "configure_model has not run"
        return self.model(batch["numbers"], batch["categories"])

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
        """Probabilities ``(batch,)`` of bad applicants."""
        return self(batch).sigmoid()

    def _evaluate(self, stage: str, metrics: MetricCollection, batch: Batch) -> None:
        logits, labels = self(batch), batch["label"]
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        self.log(f"{stage}/loss", loss, batch_size=len(labels))
        probabilities, classes = logits.float().sigmoid(), labels.long()
        for name, metric in metrics.items():
            metric.update(probabilities, labels if name == "brier" else classes)
            self.log(f"{stage}/{name}", metric, prog_bar=name == "auc", batch_size=len(labels))
