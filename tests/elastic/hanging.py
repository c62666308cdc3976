"""Runs in which a rank sleeps, or is slow, at a chosen place."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

from lightning_dist import HybridStrategy, Layout
from tests.support.models import BLOCK_PLAN, Classifier, samples
from tests.support.parity import QUIET


class Sleeps(Classifier):
    """One rank sleeps for good, once, at a place of the run."""

    def __init__(self, where: str, rank: int, folder: str) -> None:
        super().__init__()
        self.where, self.rank, self.folder = where, rank, folder

    def sleep(self, where: str) -> None:
        stops = self.where == "stopped" and where == "training"
        if (where == self.where or stops) and self.trainer.global_rank == self.rank:
            Path(self.folder, f"sleeps-{self.rank}").write_text(f"since {time.time()}")
            if stops:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(3600)

    def configure_model(self) -> None:
        self.sleep("set-up")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            self.sleep("training")
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        self.sleep("hook")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.sleep("validation")
        self(batch[0])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.sleep("save")


class Points(Dataset):
    """Some of its samples come late, or never."""

    def __init__(self, late: Any = None, seconds: float = 3600, count: int = 64) -> None:
        self.inner, self.late, self.seconds, self.count = samples(count), late, seconds, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if self.late is not None and self.late(index):
            time.sleep(self.seconds)
        return self.inner[index]


def hang(where: str, layout: str, rank: int, timeout: float, folder: str) -> None:
    """Trains until it hangs."""
    degrees, plan = Layout.parse(layout), BLOCK_PLAN if "tp" in layout else None
    assert degrees is not None
    world = degrees.world_size
    strategy = HybridStrategy(layout, tensor_plan=plan, timeout=timedelta(seconds=timeout))
    saves = [ModelCheckpoint(folder, every_n_train_steps=2)] if where == "save" else []
    arguments = {**QUIET, "enable_checkpointing": bool(saves), "max_epochs": 1, "num_sanity_val_steps": 0}
    points = Points({16 + rank}.__contains__ if where == "data" else None)
    trainer = L.Trainer(**arguments, devices=world, strategy=strategy, callbacks=saves)
    Path(folder, f"pid-{os.getpid()}").write_text(str(os.getpid()))
    if where == "data":
        Path(folder, f"sleeps-{rank}").write_text(f"since {time.time()}")
    trainer.fit(Sleeps(where, rank, folder), DataLoader(points, batch_size=4), DataLoader(samples(8), batch_size=4))


def come_late(seconds: float, timeout: float) -> int:
    """Trains for an epoch in which one rank takes its time once; gives the number of steps."""
    strategy = HybridStrategy("dp_replicate=2", timeout=timedelta(seconds=timeout))
    trainer = L.Trainer(**QUIET, devices=2, max_epochs=1, strategy=strategy)
    trainer.fit(Classifier(), DataLoader(Points({9}.__contains__, seconds), batch_size=2))
    return trainer.global_step


class Lags(Classifier):
    """Each step computes for some time, on one rank longer from a batch on; or it sleeps there."""

    def __init__(self, rank: int | None, how: str, first: int, seconds: float) -> None:
        super().__init__()
        self.rank, self.how, self.first, self.seconds = rank, how, first, seconds

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        _compute(self.seconds)
        if self.trainer.global_rank == self.rank and batch_idx >= self.first:
            if self.how == "computes":
                _compute(self.seconds / 2)
            elif self.how == "sleeps":
                time.sleep(self.seconds / 2)
        return super().training_step(batch, batch_idx)


def _compute(seconds: float) -> None:
    """As much as takes so many seconds of a core of its own."""
    begin, x = time.thread_time(), torch.ones(64, 64)
    while time.thread_time() - begin < seconds:
        x = (x @ x).clamp(-1, 1)


def lag(layout: str, rank: int | None, how: str, first: int, num_steps: int, seconds: float) -> list[tuple[str, int]]:
    """Trains; gives what was logged of stragglers, with the batch at which it was."""
    said = Saying()
    logging.getLogger("lightning_dist.elastic.watch").addHandler(said)
    world, plan = int(os.environ["WORLD_SIZE"]), BLOCK_PLAN if "tp" in layout else None
    strategy = HybridStrategy(layout, tensor_plan=plan)
    trainer = said.trainer = L.Trainer(**QUIET, devices=world, max_epochs=1, strategy=strategy)
    late = None
    data_ranks = strategy.ranks.requested.resolve(world).num_data_ranks  # type: ignore[union-attr]
    count = num_steps * 2 * data_ranks
    if how == "loads":
        late = lambda index: index % data_ranks == rank and index >= first * 2 * data_ranks  # noqa: E731
    points = Points(late, seconds / 4, count)
    try:
        trainer.fit(Lags(rank, how, first, seconds), DataLoader(points, batch_size=2))
    finally:
        logging.getLogger("lightning_dist.elastic.watch").removeHandler(said)
    return said.lines


class Saying(logging.Handler):
    """Notes what is logged, and at which batch."""

    trainer: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, int]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.getMessage(), self.trainer.fit_loop.epoch_loop.batch_idx))


@contextmanager
def burn() -> Iterator[None]:
    """Another process keeps a core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()
