"""What a module brings that watches a validation, stops a fit or writes files, of which a comparison has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping
from typing_extensions import override

_LEFT_OUT = (Checkpoint, EarlyStopping)


class WatchersOff(Callback):
    """Leaves such callbacks out, and lets schedulers on a plateau wait for a value that comes with a validation.

    Args:
        module: whose ``configure_callbacks`` is changed.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self.notes: set[str] = set()
        self._brought = module.configure_callbacks
        vars(module)["configure_callbacks"] = self._kept

    def _kept(self) -> list[Callback]:
        brought: Any = self._brought() or []
        callbacks = [*brought] if isinstance(brought, Sequence) else [brought]
        for callback in (c for c in callbacks if isinstance(c, _LEFT_OUT)):
            self.notes.add(f"{type(callback).__name__}, which the module brings, was left out in both")
        return [callback for callback in callbacks if not isinstance(callback, _LEFT_OUT)]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            config.strict = config.strict and not config.reduce_on_plateau

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        monitors = {str(config.monitor) for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
        for monitor in sorted(monitors - trainer.callback_metrics.keys()):
            told = (
                f"the scheduler that watches {monitor} was not stepped in either, as there is no validation in the fit"
            )
            self.notes.add(told)
