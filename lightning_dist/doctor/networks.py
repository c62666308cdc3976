"""Two small networks that every axis can divide, and their data: plain LightningModules, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

VOCABULARY, POSITIONS, PIXELS, CLASSES = 24, 6, 8, 5


class Classifier(pl.LightningModule):
    """Trains a network on pairs of input and class."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean cross entropy."""
        inputs, classes = batch
        return nn.functional.cross_entropy(self.network(inputs).flatten(0, -2), classes.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW: its states are saved and divided too. A small ``eps`` would blow up the rounding of gradients that are
        zero but for it, as of the biases of keys.
        """
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-4)


class Transformer(nn.Module):
    """A language model of torch.nn's own layers.

    Args:
        size: heads and layers: as many as the ranks of any axis.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        width = 4 * size
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, size, 2 * width, 0.0, batch_first=True, norm_first=True)
                for _ in range(size)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each position."""
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


class FeedForward(nn.Module):
    """Two layers, which the tensor axis divides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, features: Tensor) -> Tensor:
        """Of the same width."""
        return self.fc2(self.activation(self.fc1(features)))


class ConvNet(nn.Module):
    """Convolutions with group norm, a feed-forward part and a head.

    Args:
        size: layers: as many as the ranks of any axis.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        width = 2 * size
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(width if i else 1, width, 3, padding=1), nn.GroupNorm(2, width), nn.GELU())
                for i in range(size)
            )
        )
        self.mlp = FeedForward(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of each image."""
        return self.head(self.mlp(self.layers(images).mean(dim=(2, 3))))


def _tokens(count: int) -> Dataset[Any]:
    text = torch.randint(VOCABULARY, (count, POSITIONS + 1), generator=torch.Generator().manual_seed(5))
    return TensorDataset(text[:, :-1], text[:, 1:])


def _images(count: int) -> Dataset[Any]:
    generator = torch.Generator().manual_seed(6)
    images = torch.randn(count, 1, PIXELS, PIXELS, generator=generator, dtype=torch.float64)
    return TensorDataset(images, torch.randint(CLASSES, (count,), generator=generator))


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], Dataset[Any]]]] = {
    "transformer": (Transformer, _tokens),
    "convnet": (ConvNet, _images),
}
"""By name: makes the network of a size, and data of so many samples."""


def build(name: str, size: int) -> pl.LightningModule:
    """A module with the same weights on every rank.

    Args:
        name: of :data:`NETWORKS`.
        size: of what its axes divide.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return Classifier(NETWORKS[name][0](size)).to(torch.float64)
