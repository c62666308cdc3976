"""A LightningModule that trains a network of the zoo, as its users write it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from recipes.zoo.networks import build, reads_images, samples

BATCH, BATCHES = 4, 8


class OfZoo(L.LightningModule):
    """Trains a network by AdamW on samples of its own kind.

    Args:
        name: see :func:`recipes.zoo.networks.names`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.network = name, build(name)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch, by the network itself where it has one."""
        first, *labels = batch
        if self.name.startswith("transformers"):
            if reads_images(self.name):
                return self.network(pixel_values=first, labels=labels[0]).loss
            return self.network(input_ids=first, labels=first).loss
        if labels:
            return F.cross_entropy(self.network(first), labels[0])
        return F.cross_entropy(self.network(first[:, :-1]).flatten(0, 1), first[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As everywhere."""
        return torch.optim.AdamW(self.parameters(), 1e-3)

    def train_dataloader(self) -> DataLoader:
        """Batches of 4 for each data rank."""
        return DataLoader(TensorDataset(*samples(self.name, BATCH * BATCHES)), batch_size=BATCH)
