"""``python -m recipes.benchmark.version_rank PACKAGE DEVICE``: a rank that trains in turns, as far as it is told to.

It imports the ``lightning_dist`` that lies in its working directory, which has to be that of PACKAGE. Commands are
lines of the standard input: a :class:`Task`, ``check`` or not, ``train``, ``take N`` (steps) as often as is wanted,
``end``, and the next task. Answers are lines of JSON on the standard output.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

import lightning_dist
from recipes.benchmark.competitors import free_of_noise
from recipes.benchmark.device import join_process_group, rank_device, synchronize
from recipes.benchmark.llama import Llama, Module
from recipes.benchmark.workloads import WORKLOADS

LLAMAS = {
    "llama_tiny": Llama(width=128, depth=2, vocabulary=512, batch=8, length=32),
    "llama": Llama(width=256, depth=6, vocabulary=2048, batch=8, length=128),
}
MODELS = (*LLAMAS, *WORKLOADS)
CHECKED = "checked.ckpt"
"""Of what was trained in float64, in the working directory."""


@dataclass(frozen=True)
class Task:
    """What the ranks of a version train.

    Args:
        layout: as a string.
        model: one of ``MODELS``.
        num_steps: of the run that is timed.
        check_steps: of the run in float64.
    """

    layout: str
    model: str
    num_steps: int
    check_steps: int

    def to_line(self) -> str:
        """For the standard input."""
        return json.dumps(asdict(self))

    @property
    def data_ranks(self) -> int:
        """Ranks that see different samples."""
        axes = dict(part.split("=") for part in self.layout.split(","))
        return int(axes.get("dp_replicate", 1)) * int(axes.get("dp_shard", 1))

    def module_and_loader(self, num_steps: int) -> tuple[pl.LightningModule, Any]:
        """The same weights and batches for every version."""
        model: Any = LLAMAS.get(self.model) or WORKLOADS[self.model]
        module = Module(model) if isinstance(model, Llama) else model.module()
        return module, model.loader(num_steps * self.data_ranks)

    def trainer(self, callback: Callback, **options: Any) -> pl.Trainer:
        """Over the layout, on the rank's device."""
        return pl.Trainer(
            accelerator=rank_device().type,
            devices=dist.get_world_size(),
            strategy=lightning_dist.HybridStrategy(self.layout, checkpoint_format="single"),
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback],
            **options,
        )


class Losses(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Waits for the loss."""
        self.seen.append(float(outputs["loss"]))


class Turns(Callback):
    """After every step the rank goes on, or answers and waits for its next turn.

    Args:
        commands: gives the steps of the next turn.
        answer: takes the seconds of each step, and those that the rank's threads computed over all of them.
    """

    def __init__(self, commands: TextIO, answer: Callable[[dict[str, Any]], None]) -> None:
        self._commands, self._answer = commands, answer
        self._left, self._wall, self._last, self._user = 0, list[float](), 0.0, 0.0

    def on_train_start(self, *_: Any) -> None:
        """The setup belongs to the steps that warm up."""
        self._begin()

    def on_train_batch_end(self, *_: Any) -> None:
        """Notes the step."""
        synchronize()
        now = time.perf_counter()
        self._wall.append(now - self._last)
        self._last = now
        self._left -= 1
        if self._left == 0:
            self._answer({"wall": self._wall, "user": _user_seconds() - self._user})
            self._begin()

    def _begin(self) -> None:
        command = self._commands.readline().split()
        if not command:
            raise SystemExit("the benchmark is gone")
        if command[0] == "end":
            return
        self._left, self._wall = int(command[1]), []
        dist.barrier()
        self._user, self._last = _user_seconds(), time.perf_counter()


def _user_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def main(package: str, device: str) -> None:
    """The rank."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what is printed is no answer

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")

    free_of_noise()
    imported = Path(lightning_dist.__file__).resolve().parents[1]
    if imported != Path(package):
        raise ValueError(f"lightning_dist is that of {imported}, to be measured is that of {package}")
    join_process_group(device, dist.FileStore("store", int(os.environ["WORLD_SIZE"])))
    while line := sys.stdin.readline():
        _run(Task(**json.loads(line)), answer)
    dist.destroy_process_group()


def _run(task: Task, answer: Callable[[dict[str, Any]], None]) -> None:
    if sys.stdin.readline() == "check\n":
        losses = Losses()
        trainer = task.trainer(losses, precision="64-true")
        trainer.fit(*task.module_and_loader(task.check_steps))
        trainer.save_checkpoint(CHECKED)
        answer({"losses": losses.seen})
        sys.stdin.readline()
    task.trainer(Turns(sys.stdin, answer)).fit(*task.module_and_loader(task.num_steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
