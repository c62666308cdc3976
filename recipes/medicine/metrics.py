"""What a diagnosis is measured by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryRecall,
    BinarySensitivityAtSpecificity,
    BinarySpecificity,
    MulticlassAccuracy,
    MulticlassAUROC,
)
from torchmetrics.regression import MeanSquaredError
from torchmetrics.utilities.data import dim_zero_cat


class SensitivityAtSpecificity(BinarySensitivityAtSpecificity):
    """The share of the ill that is found by a threshold that clears at least so many of the healthy.

    Args:
        min_specificity: share of the healthy.
    """

    def compute(self) -> Any:
        """Of all that was seen."""
        return super().compute()[0]


class AccuracyOfClass(MulticlassAccuracy):
    """The share of a class that is told as such.

    Args:
        index: of the class.
        num_classes: number of classes.
    """

    def __init__(self, index: int, num_classes: int) -> None:
        super().__init__(num_classes, average=None)
        self.index = index

    def compute(self) -> Any:
        """Of all that was seen."""
        return super().compute()[self.index]


class AUCOfClass(BinaryAUROC):
    """The area under the ROC curve of a class against the others.

    Args:
        index: of the class.
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds probabilities ``(batch, num_classes)`` and labels ``(batch,)``."""
        super().update(preds[:, self.index], (target == self.index).long())


class MeanAUC(MulticlassAUROC):
    """The mean over classes of the area under the ROC curve of each against the others, of those that occur and are not
    alone; not a number where none does.

    Args:
        num_classes: number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average=None)

    def compute(self) -> Any:
        """Of all that was seen."""
        of_classes = super().compute()
        labels = dim_zero_cat(self.target)
        counts = torch.bincount(labels, minlength=len(of_classes))
        return of_classes[(counts > 0) & (counts < len(labels))].mean()


def diagnosis_metrics(min_specificity: float) -> MetricCollection:
    """By name: ``auc``, ``accuracy``, ``sensitivity`` and ``specificity`` at a probability of one half, ``brier``, and
    ``sensitivity_at_specificity``.

    Args:
        min_specificity: share of the healthy that the last one clears.
    """
    metrics: dict[str, Any] = {
        "auc": BinaryAUROC(),
        "accuracy": BinaryAccuracy(),
        "sensitivity": BinaryRecall(),
        "specificity": BinarySpecificity(),
        "brier": MeanSquaredError(),
        "sensitivity_at_specificity": SensitivityAtSpecificity(min_specificity),
    }
    return MetricCollection(metrics, compute_groups=False)


def class_metrics(num_classes: int) -> MetricCollection:
    """By name: ``accuracy``, ``auc`` (mean over the classes that occur in what is measured, each against the others, as
    MedMNIST's evaluator has it), and both of each class as ``accuracy/0`` and ``auc/0``, which are 0 for one that does
    not occur.
    """
    metrics: dict[str, Any] = {
        "accuracy": MulticlassAccuracy(num_classes, average="micro"),
        "auc": MeanAUC(num_classes),
    }
    for index in range(num_classes):
        metrics[f"accuracy/{index}"] = AccuracyOfClass(index, num_classes)
        metrics[f"auc/{index}"] = AUCOfClass(index)
    return MetricCollection(metrics, compute_groups=False)
