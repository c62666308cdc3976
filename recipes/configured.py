"""What the recipes' modules share: network and optimiser as a config says, built when Lightning asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric

from recipes.optimization import (
    OptimizerFactory,
    SchedulerFactory,
    configure_optimization,
    freeze_parameters,
    parameters_without_decay,
)


class ConfiguredModule(L.LightningModule):
    """A module that builds its network in ``configure_model``, so that a strategy chooses its device and dtype.

    Args:
        model: makes the network.
        optimizer: makes the optimizer of parameter groups.
        scheduler: makes the learning rate schedule of the optimizer and ``total_steps``; ``None`` for a fixed rate.
        freeze: names of the network's parameters that stay as they are, with ``*`` for any characters.
        learning_rates: by such a name, of parameters that have another peak than the optimizer's.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        freeze: Sequence[str] = (),
        learning_rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self._freeze, self._learning_rates = list(freeze), dict(learning_rates or {})
        self._make_model, self._make_optimizer, self._make_scheduler = model, optimizer, scheduler
        self.model: nn.Module | None = None

    @property
    def network(self) -> nn.Module:
        """The network; there after ``configure_model``."""
        assert self.model is not None, "configure_model has not run"
        return self.model

    def configure_model(self) -> None:
        """Builds the network, once: Lightning calls this for every fit, validate, test and predict."""
        if self.model is None:
            self.model = self._make_model()
            freeze_parameters(self.model, self._freeze)
            self._without_decay = parameters_without_decay(self)

    def on_validation_start(self) -> None:
        """See :func:`widen_metrics`."""
        widen_metrics(self)

    def on_test_start(self) -> None:
        """See :func:`widen_metrics`."""
        widen_metrics(self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer without weight decay on norms and biases, and rates of their own by name; schedule by step."""
        rates = {f"model.{pattern}": rate for pattern, rate in self._learning_rates.items()}
        return configure_optimization(self, self._make_optimizer, self._make_scheduler, self._without_decay, rates)


def widen_metrics(module: nn.Module) -> None:
    """Has metrics whose sums are of 16 bits sum up in float64; for when an evaluation starts.

    ``precision="bf16-true"`` and ``"16-true"`` cast them with the network, and a sum in bfloat16 stands still at 256
    times one batch.
    """
    for metric in module.modules():
        if isinstance(metric, Metric) and any(map(_is_narrow, metric.metric_state.values())):
            metric.to(torch.float64)


def _is_narrow(state: list[Tensor] | Tensor) -> bool:
    return isinstance(state, Tensor) and state.is_floating_point() and state.dtype.itemsize < 4
