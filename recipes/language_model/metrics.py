"""Ratios of sums, exact over batches of any size and over ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class RatioOfSums(Metric):
    """Sum of numerators over sum of denominators, such as nats per byte.

    Communication: two float64 sums over the ranks with different samples, when computed.
    """

    higher_is_better = False
    full_state_update = False
    numerator: Tensor
    denominator: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("numerator", "denominator"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, numerator: Tensor, denominator: Tensor) -> None:
        """Adds the sums of two tensors of any shape."""
        self.numerator += numerator.detach().double().sum()
        self.denominator += denominator.detach().double().sum()

    def compute(self) -> Tensor:
        """The ratio so far."""
        return self.numerator / self.denominator


class ExponentialOfRatio(RatioOfSums):
    """Exponential of the ratio: the perplexity, of nats and tokens."""

    def compute(self) -> Tensor:
        """The exponential so far."""
        return super().compute().exp()
