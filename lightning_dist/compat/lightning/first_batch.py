"""Private names of Lightning around the first batch of a run, which a pipeline is partitioned by."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.trainer.states import RunningStage

from lightning_dist.compat.names import uses


@uses("lightning.pytorch.LightningModule._trainer")
def set_trainer(module: Any, trainer: Any) -> None:
    """Attaches a module to a trainer, or what stands for one; None detaches it."""
    vars(module)["_trainer"] = trainer


@uses("lightning.pytorch.loops.fit_loop._FitLoop._data_source")
def data_source(loop: Any) -> Any:
    """Where a loop asks for its loaders."""
    return loop._data_source


@uses("lightning.pytorch.trainer.connectors.data_connector._request_dataloader")
def requested_loaders(loop: Any) -> Any:
    """What the user's hook gives to a loop as its loaders, asked for once more."""
    return _request_dataloader(loop._data_source)


@uses(
    "lightning.pytorch.Trainer._data_connector",
    "lightning.pytorch.trainer.connectors.data_connector._DataConnector._prepare_dataloader",
)
def prepared_loader(trainer: pl.Trainer, loader: Any, stage: RunningStage) -> Any:
    """A loader as Lightning hands it to a loop."""
    return trainer._data_connector._prepare_dataloader(loader, shuffle=stage == RunningStage.TRAINING, mode=stage)
