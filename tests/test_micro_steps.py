"""``on_after_backward`` sees, and may change, the gradients of one process after each micro-step of an accumulation."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F

from lightning_dist.checkpoint import full
from lightning_dist.placeholder import is_placeholder
from tests.support import models
from tests.support.models import BLOCK_PLAN, samples
from tests.support.parity import DATA_AND_TENSOR, Run, assert_equal, in_turn, once, train
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

PIPELINES = [
    pytest.param("pp=2", 2, id="pp2"),
    pytest.param("dp_replicate=2,pp=2", 4, id="replicate2-pp2", marks=pytest.mark.slow),
    pytest.param("dp_shard=2,pp=2", 4, id="shard2-pp2", marks=pytest.mark.slow),
]


class Watched(L.LightningModule):
    """Notes each parameter's gradient after each backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = models.Net()
        self.seen: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_after_backward(self) -> None:
        held = {name: p.grad for name, p in self.named_parameters() if not is_placeholder(p)}
        self.seen.append({name: full(g).clone() for name, g in held.items() if g is not None})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Clamps(Watched):
    """Bounds what has added up so far."""

    def on_after_backward(self) -> None:
        super().on_after_backward()
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.clamp_(-0.02, 0.02)


class TiedClamps(Clamps):
    """With a weight at both ends of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.net.head = torch.nn.Linear(models.WIDTH, models.WIDTH)
        self.net.head.weight = self.net.stem.weight


class Replaces(Callback):
    """Puts other gradients in the place of what has added up so far."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad * 0.9


def replaces() -> list[Callback]:
    return [Replaces()]


class Plain(Watched):
    on_after_backward = L.LightningModule.on_after_backward


ACCUMULATE = {"accumulate_grad_batches": 3, "max_epochs": 2}
CASES = {
    "watched": Run(Watched, samples, trainer=ACCUMULATE),
    "clamped": Run(Clamps, samples, trainer=ACCUMULATE),
    "tied": Run(TiedClamps, samples, trainer=ACCUMULATE),
    "replaced-by-a-callback": Run(Plain, samples, trainer=ACCUMULATE, callbacks=replaces),
}


def train_noting_gradients(run: Run, layout: str | None) -> Any:
    kept: list[Any] = []

    def build() -> Any:
        kept.append(run.module())
        return kept[0]

    strategy = {"tensor_plan": BLOCK_PLAN} if layout is not None and "tp" in layout else {}
    record = train(Run(**{**vars(run), "module": build, "strategy": strategy}), layout)
    return record, kept[0].seen


@pytest.mark.parametrize(("layout", "num_ranks", "case"), in_turn([*DATA_AND_TENSOR, *PIPELINES], CASES))
def test_each_micro_step_shows_the_gradients_of_one_process(case: str, layout: str, num_ranks: int) -> None:
    one, seen = once(train_noting_gradients, CASES[case], None)
    assert one.norms
    for record, seen_there in run_on_ranks(num_ranks, train_noting_gradients, CASES[case], layout):
        assert len(seen_there) == len(seen)
        for of_one, of_rank in zip(seen, seen_there, strict=True):
            assert of_rank.keys() == of_one.keys() or "pp" in layout
            for name, gradient in of_rank.items():
                torch.testing.assert_close(gradient, of_one[name], rtol=1e-4, atol=1e-6, msg=name)
        assert_equal(one, record)
