"""A folder that takes nothing for a while, being full, read-only or away: by the system's own errors, as root too."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

READ_ONLY = "/sys/kernel"
"""Nobody can make a file there."""


class Store:
    """A folder, and what is done to it.

    ``full`` holds for the files of the process that calls it alone; the others for all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._aside = folder, folder.with_name(f"{folder.name}-aside")

    def fail(self, how: str) -> None:
        """Begins to refuse; ``how`` is ``"full"``, ``"read-only"`` or ``"away"``."""
        if how == "full":
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
            return
        self.folder.mkdir(exist_ok=True)
        self.folder.rename(self._aside)
        if how == "read-only":
            os.symlink(READ_ONLY, self.folder)
        else:
            self.folder.touch()

    def recover(self) -> None:
        """Takes files again; nothing if it does."""
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        if self._aside.exists():
            self.folder.unlink()
            self._aside.rename(self.folder)


class Fails(Callback):
    """Lets a store refuse from before one batch to before another, counted over the fit from 0; on one rank."""

    def __init__(self, store: Store, how: str, begin: int, end: int, rank: int = 0) -> None:
        self.store, self.how, self.begin, self.end, self.rank = store, how, begin, end, rank
        self.batches = 0

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_rank == self.rank:
            if self.batches == self.begin:
                self.store.fail(self.how)
            if self.batches == self.end:
                self.store.recover()
        self.batches += 1
