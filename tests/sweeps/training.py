"""A recipe that notes each start of a job, fails under one learning rate and layout, and takes its time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from tests.launch.commands import command
from tests.launch.probe import Probe

SLOTS = "hydra/launcher=slots", "hydra.launcher.slots=2"


class FeedForward(torch.nn.Module):
    """A pair of dense layers, which every layout can divide."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(rows)))


class Noted(Probe):
    """Notes in ``notes`` a file for each process that fits: the step that it begins at.

    Args:
        fails_at: the learning rate, or that and the layout, as ``"0.1 tp=2"``, under which it fails in its third step.
        pause: seconds of a step.
    """

    def __init__(self, *args: Any, fails_at: str | float | None = None, pause: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fails_at, self.pause = str(fails_at), pause

    def configure_model(self) -> None:
        self.layer = FeedForward()

    def on_fit_start(self) -> None:
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        rate, _, axis = self.fails_at.partition(" ")
        if rate == f"{lr:g}" and axis in str(self.trainer.strategy.ranks.requested):
            self.fail_rank = 0

    def on_train_start(self) -> None:
        job = Path(self.trainer.checkpoint_callback.dirpath).parent.name
        (Path(self.notes) / f"{job}-rank{self.global_rank}-{os.getpid()}").write_text(str(self.global_step))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        time.sleep(self.pause)
        return super().training_step(batch, batch_idx)


def sweep(*arguments: str, directory: Path, notes: Path) -> list[str]:
    """The command of a sweep of it; jobs have one rank unless told otherwise."""
    notes.mkdir(exist_ok=True)
    own = "recipe._target_=tests.sweeps.training.Noted", f"recipe.notes={notes}", "test=false", "strategy=hybrid"
    asked = command("-m", *own, "logger=default", "trainer.log_every_n_steps=1", *arguments, directory=directory)
    asked[asked.index("targets=[tests.launch.probe]")] = "targets=[tests.launch.probe,tests.sweeps.training]"
    return asked if any(text.startswith("trainer.devices=") for text in asked) else [*asked, "trainer.devices=1"]


def starts(notes: Path) -> dict[str, list[int]]:
    """The steps at which rank 0 of each job began, by job."""
    found: dict[str, list[int]] = {}
    for note in sorted(notes.glob("*-rank0-*"), key=lambda note: note.stat().st_mtime):
        found.setdefault(note.name.partition("-")[0], []).append(int(note.read_text()))
    return found


def result(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "result.json").read_text())
