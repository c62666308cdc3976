"""Any optimizer trains as in one process, or is refused before it has changed anything: it is tried, not looked up."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import optim
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from lightning_dist.dtensors import local_part
from tests.support import models, optimizers
from tests.support.models import BLOCK_PLAN, samples
from tests.support.parity import QUIET, Run, assert_parity, slow
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

LAYOUTS = {"dp_replicate=2": 2, "dp_shard=2": 2, "tp=2": 2, "dp_shard=2,tp=2": 4, "dp_replicate=2,dp_shard=2": 4}
BY_COST = [pytest.param(layout, marks=[pytest.mark.slow] * (ranks > 2)) for layout, ranks in LAYOUTS.items()]
DIVIDING = {layout: ranks for layout, ranks in LAYOUTS.items() if layout != "dp_replicate=2"}
LOOKING_FURTHER: dict[str, Any] = {
    "Lars": optimizers.Lars,
    "Sam": partial(optimizers.sam, lr=0.1),
    "WholeClip": partial(optimizers.WholeClip, lr=0.1),
    "Adafactor": optim.Adafactor,
    "Rprop": optim.Rprop,
    "Noisy": partial(optimizers.Noisy, lr=0.1),
}


class By(models.Classifier):
    """Trained by one of the optimizers here."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(list(self.parameters()))


def _run(make: Any, layout: str) -> Run:
    return Run(partial(By, make), samples, strategy={"tensor_plan": BLOCK_PLAN} if "tp" in layout else {})


def _strategy(layout: str) -> HybridStrategy:
    return HybridStrategy(layout, tensor_plan=BLOCK_PLAN if "tp" in layout else None)


def _warm(params: Any) -> Any:
    optimizer = optim.SGD(params, 0.1, momentum=0.9, nesterov=True)
    schedule = LambdaLR(optimizer, lambda step: step / 8)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


EXACT: dict[str, Any] = {
    "adagrad": partial(optim.Adagrad, lr=1e-2, initial_accumulator_value=0.1),
    "lion": partial(optimizers.Lion, lr=1e-3),
    "lookahead": partial(optimizers.lookahead, lr=1e-2),
    "lr_from_zero": _warm,
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("layout", BY_COST)
def test_an_optimizer_that_works_element_by_element_trains_as_one_process(layout: str, name: str) -> None:
    assert_parity(_run(EXACT[name], layout), layout, LAYOUTS[layout])


@pytest.mark.parametrize("layout", [BY_COST[1], *(slow(*axis.values) for axis in BY_COST[2:])])
def test_an_optimizer_that_looks_at_more_is_exact_or_refused_on_all_ranks(layout: str) -> None:
    """On every rank in the same words, naming the optimizer, and with the parameters as they were."""
    for outcomes in zip(*run_on_ranks(DIVIDING[layout], _outcomes, layout), strict=True):
        assert len(set(outcomes)) == 1, outcomes
        name, refused, kept = outcomes[0]
        if refused == "trained":
            if name == "Noisy":  # draws, of which one process makes others
                continue
            assert_parity(_run(LOOKING_FURTHER[name], layout), layout, DIVIDING[layout])
            continue
        assert kept
        assert f"{name} " in refused
        assert "use dp_replicate, or an optimizer that works element by element" in refused


def _outcomes(layout: str) -> list[tuple[str, str, bool]]:
    return [(name, *_refusal(layout, make)) for name, make in LOOKING_FURTHER.items()]


def _refusal(layout: str, make: Any) -> tuple[str, bool]:
    """The sentence of a refusal, and whether parameters and random numbers are as they were."""
    module = By(make)
    before: list[Any] = []

    def noting(params: list[Any]) -> Any:
        optimizer = make(params)
        before.extend([params, [p.detach().clone() for p in params], torch.get_rng_state()])
        return optimizer

    module.make = noting
    trainer = L.Trainer(**QUIET, devices=torch.distributed.get_world_size(), strategy=_strategy(layout), max_steps=1)
    try:
        trainer.fit(module, DataLoader(samples(16), batch_size=4))
    except ValueError as error:
        params, values, random = before
        kept = all(torch.equal(local_part(p), local_part(value)) for p, value in zip(params, values, strict=True))
        return str(error), kept and torch.equal(random, torch.get_rng_state())
    return "trained", True


@pytest.mark.parametrize("make", [optimizers.Lars, partial(optimizers.sam, lr=0.1)])
def test_copies_of_the_whole_take_any_optimizer(make: Any) -> None:
    """Lars sees averaged gradients; Sam's second backward pass, in its own closure, is averaged too."""
    assert_parity(_run(make, "dp_replicate=2"), "dp_replicate=2", 2)
