"""A step that fails on one stage ends on all ranks, with the same words, before the optimizer changes anything."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist import HybridStrategy
from lightning_dist.parallel.pipeline.guards import GuardedInt
from tests.support.parity import QUIET
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

WIDTH = 8


class Fragile(nn.Module):
    """A layer that looks up what its input tells it, which is missing for some."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table, self.fails = nn.Linear(WIDTH, WIDTH), {0: 1.0, 1: 2.0}, True

    def forward(self, x: Tensor, marks: Tensor) -> Tensor:
        if self.fails:
            return self.linear(x) * self.table[int(marks.max())]
        return self.linear(x)


class Marked(L.LightningModule):
    """Fails in its third step, in one microbatch, in the layer of this number."""

    def __init__(self, fragile: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Fragile() for _ in range(4))
        for number, layer in enumerate(self.layers):
            layer.fails = number == fragile  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, marks = batch
        for layer in self.layers:
            x = layer(x, marks)
        return F.cross_entropy(x, y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def _loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    marks = torch.zeros(32, dtype=torch.long)
    marks[21] = 2
    x, y = torch.randn(32, WIDTH, generator=generator), torch.randint(0, WIDTH, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y, marks), batch_size=8)


def _fitted(fragile: int, layout: str, schedule: str) -> tuple[str, int, float, bool]:
    """The error, the steps that the optimizer made, the seconds since the first error, and whether a next fit ends."""
    module = Marked(fragile)
    strategy = HybridStrategy(layout, pipeline_schedule=schedule)
    devices = torch.distributed.get_world_size()
    trainer = L.Trainer(**QUIET, devices=devices, max_epochs=1, strategy=strategy)
    begun, told = time.monotonic(), ""
    try:
        trainer.fit(module, _loader())
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    took = time.monotonic() - begun
    again = L.Trainer(
        **QUIET, devices=devices, max_epochs=1, strategy=HybridStrategy(layout, pipeline_schedule=schedule)
    )
    again.fit(Marked(-1), _loader())
    return told, trainer.global_step, took, again.global_step == 4


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B", "Interleaved1F1B"])
@pytest.mark.parametrize("fragile", [0, 3])
def test_all_ranks_end_with_the_words_of_the_one_that_failed(fragile: int, schedule: str) -> None:
    records = run_on_ranks(2, _fitted, fragile, "pp=2", schedule)
    told = [told for told, *_ in records]
    assert sorted(told) == ["KeyError: 2", "RuntimeError: KeyError: 2"]
    assert [steps for _, steps, *_ in records] == [2, 2]
    assert all(goes_on for *_, goes_on in records)
    assert max(took for *_, took, _ in records) < 20


def test_a_refusal_is_one_sentence_on_all_ranks() -> None:
    records = run_on_ranks(2, _skipped)
    assert records[0] == records[1]
    assert "training_step returned NoneType as the loss of a microbatch" in records[0]


class Skipping(Marked):
    """Has no loss where a mark is."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch[2].max() > 1 else loss


def _skipped() -> str:
    trainer = L.Trainer(**QUIET, devices=2, max_epochs=1, strategy=HybridStrategy("pp=2"))
    with pytest.raises((ValueError, RuntimeError)) as raised:
        trainer.fit(Skipping(-1), _loader())
    assert trainer.global_step == 2
    return str(raised.value)


# ---------------------------------------------------------------- what a step asks


def test_questions_can_be_asked_again() -> None:
    present, asked = [7], []
    number = GuardedInt(lambda: present[0], lambda question, answer: asked.append((question, answer)))
    assert number % 2
    assert number > 3
    assert number > 3
    assert (number + 1) // 4 == 2
    assert {7: "seven"}[number] == "seven"
    assert isinstance(number + 0.5, float)
    assert torch.equal(torch.ones(2) * number, torch.full((2,), 7.0))
    present[0] = 9
    assert [question() == answer for question, answer in asked] == [True] * 4 + [False] * 3
