"""What a script of LightningCLI is made of."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from tests.support.models import Classifier, samples


class Saved(Classifier):
    """Keeps its hyperparameters in checkpoints, as LightningCLI's users do."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.save_hyperparameters()


class Data(L.LightningDataModule):
    """Batches of a size that the command line gives."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(samples(), batch_size=self.batch_size)

    val_dataloader = test_dataloader = train_dataloader
