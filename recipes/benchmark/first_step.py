"""FirstStep: notes when training really began."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class FirstStep(Callback):
    """Writes the time at which rank 0 ended its first step into a file, in seconds since the epoch."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """The first call writes."""
        if trainer.is_global_zero and not self.file.exists():
            self.file.write_text(repr(time.time()))
