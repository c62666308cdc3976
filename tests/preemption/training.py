"""A training that is told to leave at a given moment and started again until it ends, beside one that is left alone."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from lightning_dist.checkpoint import hpc_files
from lightning_dist.elastic import stop_point
from lightning_dist.trainer.resume_entry import RESUME
from tests.support import models
from tests.support.models import BLOCK_PLAN
from tests.support.parity import QUIET

REQUEUE = 75


class Noisy(L.LightningModule):
    """Draws random numbers in training and in validation, and logs steps, epochs and validations."""

    def __init__(self) -> None:
        super().__init__()
        self.net = models.Net(2)
        self.dropout = nn.Dropout(0.2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(self.dropout(batch[0])), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0] + 0.1 * torch.randn(batch[0].shape, device=batch[0].device)
        self.log("val", F.cross_entropy(self.net(x), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9), "interval": "step"},
            {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0), "monitor": "val"},
        ]


class Kept(Logger):
    """Keeps what is logged: the name, the step and the value."""

    name, version = "kept", 0

    def __init__(self) -> None:
        self.values: list[tuple[str, int, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.values += [(name, int(step or 0), float(value)) for name, value in metrics.items()]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


@dataclass(frozen=True)
class Moment:
    """When which ranks get which signal: at the n-th call of a hook, or after so many seconds of the fit."""

    hook: str | None = None
    call: int = 0
    seconds: float = 0.0
    ranks: tuple[int, ...] = (0, 1, 2, 3)
    number: int = signal.SIGTERM


class Told(Callback):
    """Sends this process a signal at a moment."""

    def __init__(self, moment: Moment) -> None:
        self.moment, self.calls, self._is_mine = moment, 0, False
        self.sent: float | None = None
        self.timer = threading.Timer(moment.seconds, self._send)

    def setup(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self._is_mine = trainer.global_rank in self.moment.ranks
        if self._is_mine and self.moment.hook is None:
            self.timer.start()

    def _send(self) -> None:
        self.sent = time.monotonic()
        os.kill(os.getpid(), self.moment.number)

    def _at(self, hook: str) -> None:
        if self._is_mine and hook == self.moment.hook:
            self.calls += 1
            if self.calls == self.moment.call:
                self._send()

    def on_train_start(self, *_: Any) -> None:
        self._at("on_train_start")

    def on_sanity_check_start(self, *_: Any) -> None:
        self._at("on_sanity_check_start")

    def on_train_batch_start(self, *_: Any) -> None:
        self._at("on_train_batch_start")

    def on_train_epoch_end(self, *_: Any) -> None:
        self._at("on_train_epoch_end")

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._at("on_validation_start")

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._at("on_validation_batch_start")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._at("on_validation_end")

    def on_save_checkpoint(self, *_: Any) -> None:
        self._at("on_save_checkpoint")


@dataclass
class Result:
    """What came of all starts: their statuses (None: it ended), what was logged, and the final weights."""

    statuses: list[int | None]
    logged: list[tuple[str, int, float]]
    weights: dict[str, Tensor]
    files: list[str]
    """What a preempted start left, "/", and what the last left."""
    seconds: float = 0.0
    """From the signal to the status."""
    handled: int = 0
    """Signals that the user's own handler got."""
    places: list[str] = field(default_factory=list)
    """Where preempted starts were saved, as their checkpoints say."""


def start(layout: str, folder: Path, moment: Moment | None, options: dict[str, Any]) -> tuple[Any, ...]:
    """One start of the script, as its process would do it."""
    hpc_files.Fit._begun = 0  # a process that begins
    L.seed_everything(1, verbose=False)
    options = {"max_epochs": 3, "val_check_interval": 4, **options}
    strategy = HybridStrategy(layout, tensor_plan=BLOCK_PLAN if "tp" in layout else None, **options.pop("strategy", {}))
    world = dist.get_world_size() if dist.is_initialized() else 1
    told, logger, module = Told(moment or Moment(ranks=())), Kept(), Noisy()
    callbacks: list[Callback] = [told]
    quiet = dict(QUIET)
    if saves := options.pop("saves", None):
        callbacks.append(ModelCheckpoint(folder / "checkpoints", save_top_k=-1, **saves))
        quiet["enable_checkpointing"] = True
    trainer = L.Trainer(
        **{**quiet, "logger": logger, "devices": world, "strategy": strategy, "callbacks": callbacks},
        **{"log_every_n_steps": 1, "default_root_dir": folder, **options},
    )
    data = strategy.ranks.requested.resolve(world).num_data_ranks
    loader = DataLoader(models.samples(), batch_size=8 // data, shuffle=True)
    validation = DataLoader(models.few_samples(), batch_size=1)
    status = None
    try:
        trainer.fit(module, loader, validation)
    except SystemExit as left:
        status = left.code
    finally:
        told.timer.cancel()
    weights = {} if status else {name: value.clone() for name, value in module.state_dict().items()}
    seconds = 0.0 if told.sent is None else time.monotonic() - told.sent
    return status, logger.values, weights, seconds


def until_it_ends(layout: str, folder: Path, moment: Moment | None = None, **options: Any) -> Result:
    """Starts until it ends by itself; the moment is in the first start. The user has handlers of his own."""
    result = Result([], [], {}, [])

    def handle(*_: Any) -> None:
        result.handled += 1

    before = signal.signal(signal.SIGTERM, handle)
    try:
        return _until_it_ends(result, layout, folder, moment, options)
    finally:
        assert signal.signal(signal.SIGTERM, before) is handle
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def place_of(path: Path) -> str:
    """Where a fit goes on that left a checkpoint."""
    file = path / "meta.pt" if path.is_dir() else path
    return str(torch.load(file, map_location="cpu", weights_only=False)[RESUME]["place"])


def _until_it_ends(result: Result, layout: str, folder: Path, moment: Moment | None, options: dict[str, Any]) -> Result:
    while len(result.statuses) < 3:
        status, logged, result.weights, seconds = start(layout, folder, moment, options)
        result.statuses.append(status)
        result.seconds = max(result.seconds, seconds)
        result.logged += logged
        if status is None:
            break
        moment = None
        result.files += sorted(file.name for file in folder.iterdir() if "hpc" in file.name)
        result.places += [place_of(path) for path in folder.glob("hpc_ckpt_*.ckpt")]
        if dist.is_initialized():
            dist.barrier()
    result.files.append("/")
    result.files += sorted(file.name for file in folder.iterdir() if "hpc" in file.name)
    return result


@dataclass(frozen=True)
class Verdict:
    """A preempted training beside one that was left alone, on one rank."""

    statuses: list[int | None]
    same_weights: bool
    same_logs: bool
    files: list[str]
    seconds: float
    handled: int
    places: list[str]


@mock.patch.object(stop_point, "POLL", 0.0)
def compare(layout: str, folder: Path, moments: list[Moment], options: dict[str, Any]) -> list[Verdict]:
    """Of each moment. Ranks ask each other at every batch of a validation, as these are short."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        for number in range(len(moments) + 1):
            (folder / str(number)).mkdir()
    if dist.is_initialized():
        dist.barrier()
    alone = until_it_ends(layout, folder / str(len(moments)), None, **options)
    verdicts = []
    for number, moment in enumerate(moments):
        told = until_it_ends(layout, folder / str(number), moment, **options)
        same = all(torch.equal(alone.weights[name], value) for name, value in told.weights.items())
        logs = alone.logged == told.logged
        verdicts.append(Verdict(told.statuses, same, logs, told.files, told.seconds, told.handled, told.places))
        if dist.is_initialized():
            dist.barrier()
    return verdicts


def duration(layout: str, folder: Path, options: dict[str, Any]) -> float:
    """Of a training that is left alone, in seconds, the same on all ranks."""
    began = time.monotonic()
    until_it_ends(layout, folder, None, **options)
    seconds = torch.tensor(time.monotonic() - began)
    if dist.is_initialized():
        dist.all_reduce(seconds, dist.ReduceOp.MIN)
    return float(seconds)


def compare_at_random(layout: str, folder: Path, seed: int, count: int, options: dict[str, Any]) -> list[Verdict]:
    """At moments that a seed draws, with the signal to one rank alone or to all."""
    first = folder / "first"
    first.mkdir(exist_ok=True)
    whole, draw = duration(layout, first, options), random.Random(seed)
    world = dist.get_world_size() if dist.is_initialized() else 1
    moments = [
        Moment(seconds=draw.uniform(0, whole), ranks=draw.choice([(0, 1), (draw.randrange(world),)]))
        for _ in range(count)
    ]
    return compare(layout, folder, moments, options)
