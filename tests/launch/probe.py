"""A recipe of one linear layer that can fail, end or wait at will; the config of the launch tests names it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Probe(pl.LightningModule):
    """Fits a linear layer; in its third step the rank ``fail_rank`` does what ``fail_how`` says."""

    def __init__(
        self,
        model: Callable[[], torch.nn.Module],
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: object = None,
        fail_rank: int | None = None,
        fail_how: str = "raise",
        notes: str | None = None,
    ) -> None:
        super().__init__()
        self.build = model
        self.build_optimizer = optimizer
        self.fail_rank, self.fail_how, self.notes = fail_rank, fail_how, notes

    def configure_model(self) -> None:
        self.layer = self.build()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.build_optimizer(self.parameters())

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.notes and self.global_step == 0:
            note = Path(self.notes) / f"rank{self.global_rank}-{os.getpid()}"
            note.write_text(str(time.time()))
            print(f"rank {self.global_rank} steps", flush=True)
        if self.global_rank == self.fail_rank and self.global_step == 2:
            self._fail()
        loss = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.layer(batch[0]).square().mean(), sync_dist=True)

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.layer(batch[0]).square().mean(), sync_dist=True)

    def predict_step(self, batch: list[torch.Tensor], batch_idx: int) -> list[str]:
        return [f"sample of {len(batch[0])} rows"]

    def _fail(self) -> None:
        if self.fail_how == "raise":
            raise ArithmeticError("the probe fails on purpose")
        os.kill(os.getpid(), signal.SIGKILL)


class ProbeData(pl.LightningDataModule):
    """Random rows; ``path`` has to exist."""

    def __init__(self, num_rows: int, batch_size: int, path: str | None = None) -> None:
        super().__init__()
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(f"data path {path} does not exist; pass data.path=<a directory>")
        self.num_rows, self.batch_size = num_rows, batch_size

    def _loader(self) -> DataLoader:
        rows = torch.randn(self.num_rows, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(rows), batch_size=self.batch_size)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader
