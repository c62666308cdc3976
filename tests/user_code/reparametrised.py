"""Weights that are computed from others: pruning, weight and spectral norm, parametrisations."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.user_code.case import SPLIT, Case
from tests.user_code.networks import Classifier, TransformerClassifier


class WeightNorm(TransformerClassifier):
    """In the blocks and outside; tp still divides the attention."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.net.layers:
            parametrizations.weight_norm(layer.mlp.fc1)
        parametrizations.weight_norm(self.net.head)


class OldWeightNorm(TransformerClassifier):
    """By the function that torch had before."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.net.layers:
            nn.utils.weight_norm(layer.mlp.fc1)


class SpectralNorm(TransformerClassifier):
    """Its power iteration writes buffers in forward."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.net.layers:
            parametrizations.spectral_norm(layer.mlp.fc1)


class Symmetric(nn.Module):
    """A parametrisation of one's own."""

    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T


class OwnParametrization(TransformerClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(8, 8)
        parametrize.register_parametrization(self.middle, "weight", Symmetric())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.middle(x))


class Pruned(TransformerClassifier):
    """A mask of half the weights, set when the module is built."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.net.layers:
            prune.l1_unstructured(layer.mlp.fc1, "weight", 0.5)


class PrunedInTraining(Classifier):
    """torch's function, before the first step."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 0:
            for block in self.net.blocks:
                prune.l1_unstructured(block.mlp.fc1, "weight", 0.5)


class MaskedByHand(Classifier):
    """The lottery ticket by hand: small weights are set to zero after each step."""

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        for name, parameter in self.named_parameters():
            if "fc" in name and parameter.ndim > 1:
                parameter.mul_(parameter.abs() >= parameter.abs().flatten().kthvalue(40).values)


def pruning() -> list[Any]:
    """Lightning's callback: of all layers together, in each epoch."""
    return [ModelPruning("l1_unstructured", amount=0.3, use_global_unstructured=True, make_pruning_permanent=True)]


CASES = [
    Case("weight_norm", WeightNorm),
    Case("old_weight_norm", OldWeightNorm),
    Case("spectral_norm", SpectralNorm),
    Case("own_parametrization", OwnParametrization),
    Case("pruned", Pruned),
    Case("pruned_in_training", PrunedInTraining, trainer={"max_epochs": 2}, refused=dict.fromkeys(SPLIT, "prun")),
    Case(
        "model_pruning",
        Classifier,
        callbacks=pruning,
        trainer={"max_epochs": 2},
        precision="32-true",
        refused=dict.fromkeys(SPLIT, "[Pp]run"),
    ),
    Case("masked_by_hand", MaskedByHand),
]
