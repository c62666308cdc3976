"""Trainings that are killed while they save: ``python -m tests.checkpoint.kills 200``.

Two ranks train a small model and save after every step; at a random moment one or both get SIGKILL. Then every
checkpoint that has its name has to load whole, none that was complete may be gone, and the next training goes on from
the last one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import socket
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy, checkpoint
from tests.support import models
from tests.support.parity import QUIET

LAYOUTS = ["dp_shard=2", "dp_replicate=2", "pp=2"]


class Noted(Callback):
    """Notes each step whose checkpoint is complete, in a file that the killer reads."""

    def __init__(self, path: Path, is_async: bool) -> None:
        self.path, self._before, self._is_async = path, 0, is_async

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # callbacks that save come last; in the background the save before is complete when another one has begun
        done = trainer.global_step - (2 if self._is_async else 1)
        if trainer.is_global_zero and self._before and done > self._before:
            with self.path.open("a") as file:
                file.write(f"{done}\n")
        self._before = self._before or trainer.global_step


def train(rank: int, port: int, folder: Path, layout: str, is_async: bool) -> None:
    """One rank, until it is killed."""
    with (folder / f"rank{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0",
        MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="kills",
    )  # fmt: skip
    warnings.simplefilter("ignore")
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=2, monitor="step", mode="max")
    last = ModelCheckpoint(folder, filename="unused", every_n_train_steps=1, save_top_k=0, save_last=True)
    strategy: Any = HybridStrategy(layout, async_save=is_async)
    callbacks = [Noted(folder / "noted", is_async), saves, last]
    trainer = L.Trainer(
        **{**QUIET, "enable_checkpointing": True}, devices=2, strategy=strategy, callbacks=callbacks, max_epochs=-1
    )
    module = models.Momentum()
    trainer.fit(module, DataLoader(models.samples(), batch_size=4), ckpt_path="last")


def kill_many(count: int, folder: Path, seed: int = 0) -> int:
    """Kills so many trainings; the number of steps that they made together.

    Raises:
        AssertionError: a checkpoint can't be read, or is gone.
    """
    context, chance = multiprocessing.get_context("fork"), random.Random(seed)
    for number in range(count):
        layout, is_async = LAYOUTS[number % len(LAYOUTS)], chance.random() < 0.5
        before = _noted(folder)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        ranks = [context.Process(target=train, args=(rank, port, folder, layout, is_async)) for rank in range(2)]
        for process in ranks:
            process.start()
        _wait_for(lambda: _noted(folder) > before, ranks, folder)  # noqa: B023
        time.sleep(chance.uniform(0, 0.5))
        victims = chance.choice([ranks, ranks[:1], ranks[1:]])
        for process in victims:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        for process in ranks:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()
        check(folder, _noted(folder))
    return _noted(folder)


def check(folder: Path, done: int) -> None:
    """Every checkpoint loads, and the last is not older than the last that was complete."""
    steps = {}
    for path in folder.glob("*.ckpt"):
        steps[path.name] = checkpoint.load(path)["global_step"]
    newest = max(steps.values(), default=0)
    assert steps.get("last.ckpt", 0) >= done, f"step {done} was complete, and there are {steps}"
    assert newest >= done


def _noted(folder: Path) -> int:
    path = folder / "noted"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(lines[-1]) if lines else 0


def _wait_for(condition: Any, ranks: list[Any], folder: Path) -> None:
    limit = time.monotonic() + 120
    while not condition():
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode is not None]
        if failed or time.monotonic() > limit:
            for process in ranks:
                process.kill()
            text = (folder / f"rank{failed[0] if failed else 0}.log").read_text()
            raise AssertionError(f"the training ended by itself or does not save:\n{text[-3000:]}")
        time.sleep(0.02)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        steps = kill_many(options.count, Path(where), options.seed)
    print(f"{options.count} kills over {steps} steps: every checkpoint loads, none that was complete is gone")
