"""ImageClassifier: cross entropy and accuracy of any network that maps images to class logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from recipes.configured import ConfiguredModule
from recipes.optimization import OptimizerFactory, SchedulerFactory


class ImageClassifier(ConfiguredModule):
    """Trains a classifier on batches of ``(images, labels)``.

    Logs ``train/loss`` by step, and by epoch ``val/loss``, ``val/accuracy``, ``test/loss`` and ``test/accuracy``.

    Args:
        model: makes the network, images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``.
            Called in ``configure_model``, so that a strategy chooses the device and dtype it is built on.
        optimizer: makes the optimizer of parameter groups.
        scheduler: makes the learning rate schedule of the optimizer and ``total_steps``; ``None`` for a fixed rate.
        num_classes: number of classes.
        label_smoothing: share of the target spread evenly over the classes, in training only.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        *,
        num_classes: int,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(model, optimizer, scheduler)
        self.label_smoothing = label_smoothing
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)`` of images ``(batch, channels, height, width)``."""
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of a batch, smoothed if asked."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy of a validation batch."""
        self._evaluate("val", self.val_accuracy, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy of a test batch."""
        self._evaluate("test", self.test_accuracy, batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities ``(batch, num_classes)``; labels in the batch are left aside."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).softmax(dim=-1)

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images).float()
        accuracy.update(logits, labels)
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True, batch_size=len(labels))
