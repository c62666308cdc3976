"""A training that takes snapshots, ends by an exception or a signal, and is started again."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_dist import HybridStrategy
from lightning_dist.checkpoint import full, gather_state
from lightning_dist.elastic.attempt import DIRECTORY, NUMBER
from lightning_dist.elastic.states import Fits
from lightning_dist.trainer.checkpoints import stage_ranks
from tests.support import models
from tests.support.parity import QUIET

SIZE = 24


class Stopped(Exception):
    """In place of a rank that dies."""


class Numbered(Dataset):
    """Samples with their number, augmented at random."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x = torch.randn(models.WIDTH, generator=torch.Generator().manual_seed(index))
        noise = torch.randn(models.WIDTH) + float(np.random.rand()) + random.random()
        return x + 0.1 * noise, torch.tensor(index % models.CLASSES), index


class Net(L.LightningModule):
    """Blocks with a norm, dropout and a buffer that counts; AdamW, whose states come with its first step."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.build(norm)

    def build(self, norm: bool) -> None:
        self.blocks = nn.ModuleList([models.Block() for _ in range(2)])
        self.norm = nn.BatchNorm1d(models.WIDTH) if norm else nn.Identity()
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(models.WIDTH, models.CLASSES)
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(self.norm(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", F.cross_entropy(self(batch[0]), batch[1]))

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return [optimizer], [
            {"scheduler": schedule, "interval": "step"},
            {"scheduler": plateau, "monitor": "val", "strict": False},
        ]


class Late(Net):
    """Built when the layout is known, so a rank reads no more than its parts."""

    def __init__(self, norm: bool = True) -> None:
        L.LightningModule.__init__(self)
        self._norm = norm

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            self.build(self._norm)


class Average(Callback):
    """A moving average of a parameter, in a plain tensor."""

    mean: Tensor | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        loss = trainer.callback_metrics.get("loss", torch.zeros(()))
        self.mean = torch.full((70,), float(trainer.global_step)) if self.mean is None else 0.9 * self.mean + loss + 1

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


@dataclass(eq=False)
class Stop(Callback):
    """Notes batches, losses and hooks, and ends the training at some place, after so many optimizer steps."""

    at: str = ""
    steps: int = 0
    kills: tuple[int, ...] = ()
    seen: list[tuple[int, list[int]]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    hooks: list[str] = field(default_factory=list)

    def _stop(self, at: str, trainer: L.Trainer) -> None:
        if self.at == at and trainer.global_step == self.steps:
            if trainer.global_rank in self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            if not self.kills:
                raise Stopped(at)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._stop("batch", trainer)

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        self._stop("backward", trainer)

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self._stop("step", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((trainer.current_epoch, batch[2].tolist()))
        self.losses.append(float(outputs["loss"]))

    def on_validation_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._stop("validation", trainer)

    def on_validation_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.hooks.append(f"validation {trainer.global_step}")

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.hooks.append(f"epoch {trainer.current_epoch}")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.hooks.append(f"end of epoch {trainer.current_epoch}")
        self._stop("epoch", trainer)


@dataclass
class Leg:
    """What a start of the ranks did, of one rank.

    Args:
        state: of the module and the optimizer at the end, whole.
    """

    seen: list[tuple[int, list[int]]]
    losses: list[float]
    hooks: list[str]
    first: int
    steps: int
    state: dict[str, Tensor]
    average: Tensor | None


def leg(
    layout: str,
    directory: Path,
    number: int = 0,
    stop: tuple[Any, ...] = (),
    options: dict[str, Any] | None = None,
    ranks_per_node: int = 4,
) -> Leg:
    """One start of the ranks. Ranks of another node have another directory."""
    size = 2 if "dp_replicate=2,dp_shard=2" in layout else 4  # six steps or more
    options = {"max_epochs": 2, "snapshot_every_n_steps": 1, "batch_size": size, "norm": True, **(options or {})}
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    here = directory / f"node{rank // ranks_per_node}"
    here.mkdir(parents=True, exist_ok=True)
    os.environ.update({DIRECTORY: str(here), NUMBER: str(number)})
    Fits.begun, Fits.has_stepped = 0, False  # as in a new process
    try:
        return _leg(layout, world, stop, options)
    finally:
        del os.environ[DIRECTORY], os.environ[NUMBER]


def _leg(layout: str, world: int, stop: tuple[Any, ...], options: dict[str, Any]) -> Leg:
    L.seed_everything(1, verbose=False)
    whole: Any = {"pipeline_schedule": "GPipe", "num_microbatches": 1} if "pp" in layout else {}  # for BatchNorm
    plan = {"tensor_plan": models.BLOCK_PLAN} if "tp" in layout else {}
    every, save = options.pop("snapshot_every_n_steps"), options.pop("async_save", False)
    strategy = HybridStrategy(layout, snapshot_every_n_steps=every, async_save=save, **whole, **plan)
    batch_size, norm = options.pop("batch_size"), options.pop("norm")
    module, watch, average = options.pop("module", Net)(norm), Stop(*stop), Average()
    first: list[int] = []
    watch.on_train_start = lambda trainer, *_: first.append(trainer.global_step)  # type: ignore[method-assign]
    others, source = options.pop("callbacks", []), options.pop("data", Numbered)()
    trainer = L.Trainer(
        **{**QUIET, **options, "devices": world, "strategy": strategy, "callbacks": [watch, average, *others]}
    )
    state: dict[str, Tensor] = {}
    watch.on_train_end = lambda *_: state.update(whole_state(trainer))  # type: ignore[method-assign]
    data = DataLoader(source, batch_size=batch_size, shuffle=isinstance(source, Numbered))
    with suppress(Stopped):
        trainer.fit(module, data, DataLoader(Numbered(), batch_size=4))
    return Leg(watch.seen, watch.losses, watch.hooks, *(first or [-1]), trainer.global_step, state, average.mean)


def whole_state(trainer: L.Trainer) -> dict[str, Tensor]:
    """The module's state, whole, on rank 0."""
    strategy: Any = trainer.strategy
    state = gather_state({"state_dict": strategy.lightning_module_state_dict()}, stage_ranks(strategy.ranks))
    return {name: full(value).clone() for name, value in (state.get("state_dict") or {}).items()}
