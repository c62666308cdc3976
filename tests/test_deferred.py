"""What ``configure_model`` builds is deferred where a rank holds a part of it, and has the values of plain building."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_dist import HybridStrategy
from lightning_dist.initialization.install import RecordedInit
from lightning_dist.parallel.placing import to_device
from tests.support import models
from tests.support.models import BLOCK_PLAN, few_samples, samples
from tests.support.parity import QUIET, Run, assert_parity, slow, whole_weights
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled


class Buffered(models.Deferred):
    """With a buffer that has values, and BatchNorm's."""

    def configure_model(self) -> None:
        if self.net is None:
            self.net = models.Net(4)
            self.net.register_buffer("scale", torch.rand(models.WIDTH) + 0.5)

    def forward(self, x: Any) -> Any:
        return self.net(x * self.net.scale)  # type: ignore[operator,union-attr]


@pytest.mark.parametrize(
    ("layout", "num_ranks"), [("tp=2", 2), ("dp_shard=2,tp=2", 4), ("pp=2", 2), slow("pp=2,dp_shard=2", 4)]
)
def test_a_deferred_model_trains_as_one_process(layout: str, num_ranks: int) -> None:
    strategy = {"tensor_plan": BLOCK_PLAN} if "tp" in layout else {}
    assert_parity(Run(Buffered, samples, few_samples, strategy=strategy), layout, num_ranks)


@pytest.mark.parametrize("layout", ["tp=2", "pp=2"])
def test_it_is_deferred(layout: str) -> None:
    for deferred, whole in run_on_ranks(2, _deferred, layout):
        assert deferred == whole


def _deferred(layout: str) -> tuple[set[str], set[str]]:
    """Names that were deferred, and those of all parameters and buffers of the network."""
    bind, bound = RecordedInit.bind, set()

    def noting(self: RecordedInit, module: nn.Module) -> None:
        bind(self, module)
        bound.update(name for name in self.names if name.startswith("net."))

    RecordedInit.bind = noting  # type: ignore[method-assign]
    try:
        module = Buffered()
        strategy = HybridStrategy(layout, tensor_plan=BLOCK_PLAN if "tp" in layout else None)
        trainer = L.Trainer(**QUIET, devices=2, strategy=strategy, max_steps=1)
        trainer.fit(module, DataLoader(samples(), batch_size=8))
    finally:
        RecordedInit.bind = bind  # type: ignore[method-assign]
    assert not any(p.is_meta for p in module.parameters())
    return bound, {name for name in module.state_dict() if name.startswith("net.")}


@pytest.mark.parametrize("layout", ["tp=2", "pp=2"])
def test_what_is_refused_at_set_up_is_told_as_it_is(layout: str) -> None:
    """And not that what is deferred can't leave the meta device."""
    for error in run_on_ranks(2, _refused, layout):
        assert error.startswith("ValueError: tp finds nothing" if "tp" in layout else "ValueError: pp runs a step")


def _refused(layout: str) -> str:
    module = Buffered()
    module.configure_model = lambda: setattr(module, "net", nn.Linear(models.WIDTH, models.CLASSES))  # type: ignore[method-assign]
    return _error_of(module, layout)


@pytest.mark.parametrize("layout", ["dp_shard=2", "pp=2", "dp_replicate=2"])
def test_a_module_that_one_layout_refused_trains_under_another(layout: str) -> None:
    for refused, (weights, first) in run_on_ranks(2, _refused_then, layout):
        assert refused.startswith("ValueError: tp finds nothing")
        for name, value in weights.items():
            assert torch.equal(value, first[name]), name


class Plain(models.Deferred):
    """Has nothing that the tensor axis divides."""

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(models.WIDTH, 32), nn.LayerNorm(32), nn.Linear(32, models.CLASSES))


def _refused_then(layout: str) -> tuple[str, Any]:
    """What the first run said, and the weights that the second began with, beside those of plain building."""
    L.seed_everything(3, verbose=False)
    plain = Plain()
    plain.configure_model()
    L.seed_everything(3, verbose=False)
    module = Plain()
    refused = _error_of(module, "tp=2")
    began = _Began()
    trainer = L.Trainer(**QUIET, devices=2, strategy=HybridStrategy(layout), max_steps=2, callbacks=[began])
    trainer.fit(module, DataLoader(samples(), batch_size=8))
    return refused, (began.weights, plain.net.state_dict())  # type: ignore[union-attr]


class _Began(L.Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.weights = {name: value.detach().clone() for name, value in whole_weights(pl_module.net).items()}


def _error_of(module: L.LightningModule, layout: str) -> str:
    try:
        trainer = L.Trainer(**QUIET, devices=2, strategy=HybridStrategy(layout), max_steps=1)
        trainer.fit(module, DataLoader(samples(), batch_size=8))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def test_metrics_and_what_is_ready_go_to_the_device_beside_what_is_deferred() -> None:
    """``meta`` stands for the device; the network that is deferred is on it before."""
    module = L.LightningModule()
    module.ready, module.later, module.metric = nn.Linear(2, 2), nn.Linear(2, 2, device="meta"), MeanMetric()
    to_device(module, torch.device("meta"))
    assert module.device.type == "meta"
    assert module.ready.weight.is_meta
    assert module.metric.device.type == "meta"
    assert module.metric.mean_value.is_meta
