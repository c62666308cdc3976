"""What a strategy reports of a module that it has set up."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_dist.report import LayoutReport
from tests.support.parity import QUIET


class _Keep(Callback):
    report: LayoutReport | None = None

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        self.report = trainer.strategy.parts.module_setup.report(pl_module)


def report_of_a_fit(module: L.LightningModule, loader: DataLoader, strategy: Any, num_ranks: int) -> LayoutReport:
    """Of this rank, while one step of a fit runs; afterwards the module is whole again."""
    keep = _Keep()
    L.Trainer(**QUIET, devices=num_ranks, strategy=strategy, max_steps=1, callbacks=[keep]).fit(module, loader)
    assert keep.report is not None
    return keep.report
