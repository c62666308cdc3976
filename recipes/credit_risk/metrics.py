"""What lenders measure a score by, beside what torchmetrics has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryAUROC, BinaryCalibrationError, BinaryROC
from torchmetrics.regression import MeanSquaredError


class Gini(BinaryAUROC):
    """Twice the area under the ROC curve, less one: 0 for chance, 1 for a perfect order."""

    def compute(self) -> Any:
        """Of all that was seen."""
        return 2 * super().compute() - 1


class KolmogorovSmirnov(BinaryROC):
    """The greatest distance between the shares of bad and of good applicants above a score."""

    def compute(self) -> Any:
        """Of all that was seen."""
        false_positives, true_positives, _ = super().compute()
        return (true_positives - false_positives).max()


class CostWeightedAccuracy(Metric):
    """Share of what mistakes could cost that was not lost, if one decides by expected cost.

    Args:
        cost_of_bad: of a credit given to a bad applicant, in costs of one that is refused to a good one.
    """

    higher_is_better = True
    full_state_update = False
    saved: Tensor
    total: Tensor

    def __init__(self, cost_of_bad: float = 5.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.cost_of_bad = cost_of_bad
        self.add_state("saved", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds probabilities of being bad, and labels, 1 for bad."""
        refuses = preds > 1 / (1 + self.cost_of_bad)
        weights = torch.where(target > 0, self.cost_of_bad, 1.0).double()
        self.saved += (weights * (refuses == (target > 0))).sum()
        self.total += weights.sum()

    def compute(self) -> Any:
        """Of all that was seen."""
        return (self.saved / self.total).float()


def credit_metrics(cost_of_bad: float) -> MetricCollection:
    """By name: ``auc``, ``gini``, ``ks``, ``brier`` (squared error of the probability), ``calibration_error``
    (expected, over 10 bins), ``cost_weighted_accuracy``.
    """
    metrics: dict[str, Any] = {
        "auc": BinaryAUROC(),
        "gini": Gini(),
        "ks": KolmogorovSmirnov(),
        "brier": MeanSquaredError(),
        "calibration_error": BinaryCalibrationError(n_bins=10),
        "cost_weighted_accuracy": CostWeightedAccuracy(cost_of_bad),
    }
    return MetricCollection(metrics, compute_groups=False)
