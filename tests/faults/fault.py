"""One fault, and a callback that has it strike at a named moment of a training."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
MOMENTS = ("set-up", "load", "batch", "collective", "save")


@dataclass(frozen=True)
class Fault:
    """What happens to one process.

    Args:
        kind: ``"kill"``, ``"stop"`` (SIGSTOP), or ``"raise"``.
        rank: whom it strikes.
        when: one of :data:`MOMENTS`: in ``setup``; when a checkpoint's state is handed to hooks; before a batch; after
            a backward, while others wait in a collective; while a checkpoint is put together.
        step: steps done by then; None: the first time.
        attempt: in which start of the ranks; None: in each.
    """

    kind: str
    rank: int
    when: str
    step: int | None = None
    attempt: int | None = 0

    def strike(self) -> None:
        """Strikes this process."""
        if self.kind == "raise":
            raise ArithmeticError(f"a fault in {self.when}")
        os.kill(os.getpid(), SIGNALS[self.kind])


class Faults(Callback):
    """Has faults strike the ranks that run it, each at its moment."""

    def __init__(self, *faults: Fault) -> None:
        assert all(fault.when in MOMENTS for fault in faults)
        self.faults = faults

    def _at(self, when: str, trainer: L.Trainer) -> None:
        attempt = int(os.environ.get("LIGHTNING_DIST_ATTEMPT", "0"))
        for fault in self.faults:
            is_now = fault.when == when and fault.step in (None, trainer.global_step)
            if is_now and fault.rank == trainer.global_rank and fault.attempt in (None, attempt):
                fault.strike()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._at("set-up", trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._at("load", trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("batch", trainer)

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("collective", trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._at("save", trainer)
