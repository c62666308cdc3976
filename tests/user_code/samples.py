"""Small data for all cases: everything random about a sample is part of it, so that its rank does not matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES = 8, 4


def points(count: int = 32, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Points of 8 features, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    return x, (x[:, :CLASSES] + 0.3 * x[:, -CLASSES:]).argmax(1)


def dataset(count: int = 32, seed: int = 3) -> TensorDataset:
    """Points and classes."""
    return TensorDataset(*points(count, seed))


def loader(size: int, count: int = 32, **options: Any) -> DataLoader:
    """Four steps of points and classes."""
    return DataLoader(dataset(count), batch_size=size, **options)


def noisy_loader(size: int, count: int = 32) -> DataLoader:
    """Points, classes, and noise that a network draws its own from, of which one process has the same."""
    noise = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(9))
    return DataLoader(TensorDataset(*points(count), noise), batch_size=size)


def val_loader(count: int = 12, **options: Any) -> DataLoader:
    """Three batches of four."""
    return DataLoader(dataset(count, seed=4), **{"batch_size": 4, **options})


def images(size: int, count: int = 32) -> DataLoader:
    """One-channel images of 8 x 8 and masks of what is bright in them."""
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(x, (x > 0.5).float()), batch_size=size)
