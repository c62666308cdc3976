"""A module that raises at a chosen place of a fit, on chosen ranks."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from tests.support.models import Words, words
from tests.support.parity import QUIET, Watch


class Pruned(Exception):
    """As of a search for hyper-parameters."""


class Stops(Words):
    """Raises at some place of the second epoch, on some ranks."""

    def __init__(self, where: str, ranks: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        super().__init__()
        self.where, self.ranks = where, ranks

    def stop(self, where: str) -> None:
        if where == self.where and self.trainer.current_epoch == 1 and self.trainer.global_rank in self.ranks:
            raise Pruned(where)

    def forward(self, x: Tensor) -> Tensor:
        if self.trainer.training:
            self.stop("forward")
        return super().forward(x)

    def on_before_backward(self, loss: Tensor) -> None:
        self.stop("backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.stop("step")

    def validation_step(self, batch: Any) -> None:
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def on_validation_epoch_end(self) -> None:
        self.stop("validation")


def fit(module: L.LightningModule, layout: str | None, trainer: L.Trainer | None = None) -> tuple[Any, list[float]]:
    world = dist.get_world_size() if dist.is_initialized() else 1
    strategy: Any = "auto" if layout is None else HybridStrategy(layout)
    watch = Watch()
    if trainer is None:
        trainer = L.Trainer(**QUIET, devices=world, strategy=strategy, max_epochs=2, callbacks=[watch])
    else:
        watch = next(callback for callback in trainer.callbacks if isinstance(callback, Watch))
    ranks = 1 if layout is None else HybridStrategy(layout).ranks.requested.resolve(trainer.world_size).num_data_ranks
    loader = DataLoader(words(), batch_size=8 // ranks)
    trainer.fit(module, loader, DataLoader(words(), batch_size=4))
    return trainer, watch.losses


def two_ranks() -> L.Trainer:
    return L.Trainer(**QUIET, devices=2, strategy=HybridStrategy("dp_replicate=2"), max_epochs=2, callbacks=[Watch()])
