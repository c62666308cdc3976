"""ImitationModule: learns an expert's actions from its observations, and is scored by driving itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from recipes.configured import ConfiguredModule
from recipes.driving.data import DrivingData
from recipes.driving.highway import ACTIONS, FIGURES, Fleet
from recipes.optimization import OptimizerFactory, SchedulerFactory

Batch = dict[str, Tensor]


class ImitationModule(ConfiguredModule):
    """Trains a driver on batches of :class:`~recipes.driving.data.Decisions` (behavioural cloning, D. Pomerleau 1988),
    and tests it in closed loop on those of :class:`~recipes.driving.data.Seconds`.

    Logs ``train/loss`` by step, ``val/loss`` and ``val/accuracy`` by epoch, and of the test, as means over the
    episodes, ``test/NAME`` of :data:`~recipes.driving.highway.FIGURES`.

    [Note: closed loop]
    A test step is one second of a group of episodes: one forward pass, whatever the layout. Before it, the data module
    puts into the batch what the drivers see; after it, all ranks that share the network let the same traffic move by
    the same actions. So no rank has a pass more than another; actions move nothing in an episode that has ended.

    Args:
        model: makes the network, from ``grid`` and ``vehicles`` to logits ``(batch, num_actions)``.
        optimizer: makes the optimizer of parameter groups.
        scheduler: makes the learning rate schedule of the optimizer and ``total_steps``; ``None`` for a fixed rate.
    """

    def __init__(
        self, model: Callable[[], nn.Module], optimizer: OptimizerFactory, scheduler: SchedulerFactory | None = None
    ) -> None:
        super().__init__(model, optimizer, scheduler)
        self.val_accuracy = MulticlassAccuracy(len(ACTIONS), average="micro")
        self.test_figures = nn.ModuleDict({name: MeanMetric() for name in FIGURES})

    def forward(self, grid: Tensor, vehicles: Tensor) -> Tensor:
        """Logits ``(batch, num_actions)``."""
        return self.network(grid, vehicles)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy of the expert's actions."""
        loss = F.cross_entropy(self(batch["grid"], batch["vehicles"]), batch["action"])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["action"]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss, and the share of the expert's actions that are the likeliest."""
        logits, actions = self(batch["grid"], batch["vehicles"]).float(), batch["action"]
        self.val_accuracy.update(logits, actions)
        self.log("val/loss", F.cross_entropy(logits, actions), batch_size=len(actions))
        self.log("val/accuracy", self.val_accuracy, prog_bar=True, batch_size=len(actions))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities ``(batch, num_actions)``."""
        return self(batch["grid"], batch["vehicles"]).softmax(dim=-1)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The likeliest actions ``(batch,)``; see [Note: closed loop]."""
        return {"action": self(batch["grid"], batch["vehicles"]).argmax(dim=-1)}

    def on_test_batch_end(self, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Drives a second; adds to the figures the episodes that are at their last."""
        for figures in driven_by(self.trainer).step(batch["seed"].tolist(), outputs["action"].tolist()):
            for name, value in figures.items():
                metric: Any = self.test_figures[name]
                metric.update(value)

    def on_test_epoch_end(self) -> None:
        """Logs the means over all episodes."""
        for name in FIGURES:
            metric: Any = self.test_figures[name]
            self.log(f"test/{name}", metric, prog_bar=name == "reward")


def driven_by(trainer: L.Trainer) -> Fleet:
    """The episodes of a trainer's test.

    Raises:
        TypeError: its data is not what has episodes.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, DrivingData):
        raise TypeError(
            f"the test drives the episodes of DrivingData, and the data module is {type(data).__name__}; pass "
            "trainer.test(module, datamodule=DrivingData(...))"
        )
    return data.fleet
