"""Data in three parts: to train on, to validate on, and held out."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader, Dataset


class PartsData(L.LightningDataModule):
    """Loaders over the parts ``train``, ``val`` and ``test`` that a subclass puts in :attr:`parts`.

    Args:
        batch_size: samples per process and step.
        num_workers: processes that read ahead; 0 reads in the training process.
        eval_batch_size: samples per process and batch of evaluation, by default ``batch_size``.
    """

    def __init__(self, batch_size: int, num_workers: int = 0, eval_batch_size: int | None = None) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.parts: dict[str, Dataset[Any]] = {}

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches; an incomplete last one is dropped, so every step has the same number of samples."""
        return self._loader("train", self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Every validation sample once."""
        return self._loader("val", self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """Every test sample once."""
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test samples."""
        return self._loader("test", self.eval_batch_size)

    def _loader(self, part: str, batch_size: int, **arguments: Any) -> DataLoader[Any]:
        return DataLoader(
            self.parts[part],
            batch_size=batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.accelerator.is_available(),
            **arguments,
        )
