"""Averages of weights over the steps, by hand and by the classes for it."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from tests.user_code.case import Case, evaluated
from tests.user_code.networks import Classifier, TransformerClassifier

DECAY = 0.8


class Ema(Callback):
    """Keeps a copy of each weight, and evaluates with the copies."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.average = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            self.average[name].mul_(DECAY).add_(parameter, alpha=1 - DECAY)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.kept = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.put(pl_module, self.average)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.put(pl_module, self.kept)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.put(pl_module, self.average)

    def put(self, pl_module: L.LightningModule, weights: dict[str, Tensor]) -> None:
        for name, parameter in pl_module.named_parameters():
            parameter.data.copy_(weights[name])


class EmaBySwap(Ema):
    """Puts the copies in place of the weights' data."""

    def put(self, pl_module: L.LightningModule, weights: dict[str, Tensor]) -> None:
        for name, parameter in pl_module.named_parameters():
            parameter.data = weights[name].clone()


class EmaOfStateDict(Ema):
    """Copies the state dict, as timm's does."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.average = copy.deepcopy(pl_module.state_dict())

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        for name, value in pl_module.state_dict().items():
            self.average[name] = DECAY * self.average[name] + (1 - DECAY) * value

    def put(self, pl_module: L.LightningModule, weights: dict[str, Tensor]) -> None:
        pl_module.load_state_dict(weights)


class Averaged(Classifier):
    """torch's AveragedModel as a part of the module, used in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def on_train_batch_end(self, *args: Any) -> None:
        self.average.update_parameters(self.net)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.average(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.1)


class Copied(Averaged):
    """A deep copy made when the fit starts."""

    def __init__(self) -> None:
        super().__init__()
        del self.average

    def on_fit_start(self) -> None:
        self.average = copy.deepcopy(self.net).requires_grad_(False)  # type: ignore[assignment]

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        for mine, theirs in zip(self.average.parameters(), self.net.parameters(), strict=True):
            mine.lerp_(theirs, 1 - DECAY)


class BestKept(Classifier):
    """Keeps the weights of the best validation in memory, and ends with them."""

    def on_validation_epoch_end(self) -> None:
        loss = float(self.trainer.callback_metrics["val_loss"])
        if loss < getattr(self, "best", 1e9):
            self.best, self.weights = loss, {n: w.clone() for n, w in self.state_dict().items()}

    def on_train_end(self) -> None:
        self.load_state_dict(self.weights)


class Exponential(WeightAveraging):
    """Lightning's, of each step."""

    def __init__(self) -> None:
        super().__init__(avg_fn=get_ema_avg_fn(DECAY))


CASES = [
    Case("ema_callback", Classifier, val=evaluated, callbacks=lambda: [Ema()], trainer={"max_epochs": 2}),
    Case("ema_by_swap", Classifier, val=evaluated, callbacks=lambda: [EmaBySwap()], trainer={"max_epochs": 2}),
    Case("ema_state_dict", TransformerClassifier, val=evaluated, callbacks=lambda: [EmaOfStateDict()]),
    Case("ema_averaged_model", Averaged, val=evaluated),
    Case("ema_deepcopy", Copied, val=evaluated),
    Case("weight_averaging", TransformerClassifier, val=evaluated, callbacks=lambda: [Exponential()]),
    Case(
        "stochastic_weight_averaging",
        Classifier,
        callbacks=lambda: [StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)],
        trainer={"max_epochs": 3},
    ),
    Case("best_weights_kept", BestKept, val=evaluated, trainer={"max_epochs": 3}),
]
