"""The figures of other drivers, beside those of one that is tested."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback

from recipes.driving.data import DrivingData


class OtherDrivers(Callback):
    """Logs at the end of a test ``test/DRIVER/NAME``, the figures of other drivers on the same episodes, which were
    scored when the expert was recorded: the expert, two constant policies, and logistic regression of the kinematics.
    """

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """On every rank alike."""
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, DrivingData):
            return
        for driver, figures in data.references.items():
            for name, value in figures.items():
                pl_module.log(f"test/{driver}/{name}", value)
