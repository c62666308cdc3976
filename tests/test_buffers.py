"""Buffers that training writes are the first rank's on every rank, as under ddp; others cost nothing."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from tests.support.collectives import counting
from tests.support.models import CLASSES, WIDTH, Block, samples
from tests.support.parity import QUIET, Run, assert_equal, one_process, train
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

LAYOUTS = [
    pytest.param("dp_replicate=2", 2, id="replicate2"),
    pytest.param("dp_shard=2", 2, id="shard2"),
    pytest.param("dp_replicate=2,dp_shard=2", 4, id="replicate2-shard2", marks=pytest.mark.slow),
    pytest.param("dp_replicate=2,pp=2", 4, id="replicate2-pp2"),
    pytest.param("dp_shard=2,pp=2", 4, id="shard2-pp2", marks=pytest.mark.slow),
]


class Quantiser(nn.Module):
    """A codebook that moves towards what it is given, in its forward: written in place, replaced, and counted."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(5)))
        self.register_buffer("sizes", torch.ones(6))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("constant", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        nearest = F.one_hot(torch.cdist(x.detach(), self.codes).argmin(1), 6).to(x.dtype)
        if self.training:
            with torch.no_grad():
                self.sizes = 0.9 * self.sizes + 0.1 * nearest.sum(0)
                self.codes.lerp_(nearest.T @ x / self.sizes[:, None], 0.1)
                self.num_calls += 1
        return x + (nearest @ self.codes - x).detach()


class Quantised(L.LightningModule):
    """Notes its buffers at the start and at the end of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(WIDTH, WIDTH), nn.Sequential(Block(), Block())
        self.norm = nn.BatchNorm1d(WIDTH)
        self.quantiser, self.head = Quantiser(), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("centre", torch.zeros(WIDTH))
        self.begins: list[dict[str, Tensor]] = []
        self.ends: list[dict[str, Tensor]] = []

    def written(self) -> dict[str, Tensor]:
        return {name: b.clone() for name, b in self.named_buffers() if not name.startswith("norm")}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.quantiser(self.norm(self.blocks(self.stem(x)))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.begins.append(self.written())
        return F.cross_entropy(self(x - self.centre), y)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.centre = 0.9 * self.centre + 0.1 * batch[0].mean(0)
        self.ends.append(self.written())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


Noted = tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]


def fit(module: L.LightningModule, layout: str, **arguments: Any) -> None:
    world = dist.get_world_size()
    runner = L.Trainer(**{**QUIET, "devices": world, "max_epochs": 1, "strategy": HybridStrategy(layout), **arguments})
    runner.fit(module, DataLoader(samples(), batch_size=16 // world))


def _begins_and_ends(kind: type[Quantised], layout: str, arguments: dict[str, Any]) -> Noted:
    L.seed_everything(1, verbose=False)
    module = kind()
    fit(module, layout, **arguments)
    return module.begins, module.ends


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS[:3])
def test_a_step_begins_with_the_first_ranks_buffers(layout: str, num_ranks: int, accumulate: int) -> None:
    ranks = run_on_ranks(num_ranks, _begins_and_ends, Quantised, layout, {"accumulate_grad_batches": accumulate})
    (_, of_first), *_ = ranks
    for begins, ends in ranks:
        assert len(begins) == 4
        for step in range(1, 4):
            for name, value in of_first[step - 1].items():
                assert torch.equal(begins[step][name], value), f"{step} {name}"
        assert torch.equal(ends[-1]["quantiser.constant"], torch.arange(4.0))
        assert int(ends[-1]["quantiser.num_calls"]) == 4
    assert not torch.equal(ranks[1][1][0]["quantiser.codes"], of_first[0]["quantiser.codes"])


class Late(Quantised):
    """Writes nothing before its third step; on one rank only, where ``one_rank`` says so."""

    one_rank = False

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx >= 1 and (self.global_rank == 0 or not self.one_rank):
            self.centre += batch[0].mean(0)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ends.append(self.written())


class LateOnOneRank(Late):
    one_rank = True


@pytest.mark.parametrize("kind", [Late, LateOnOneRank])
@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS[:3])
def test_a_buffer_that_is_written_late_is_shared_from_then_on(layout: str, num_ranks: int, kind: Any) -> None:
    ranks = run_on_ranks(num_ranks, _begins_and_ends, kind, layout, {})
    (_, of_first), *_ = ranks
    for begins, _ in ranks:
        assert torch.equal(begins[2]["centre"], of_first[1]["centre"])
        assert torch.equal(begins[3]["centre"], of_first[2]["centre"])
        assert not begins[1]["centre"].any()


class Growing(Late):
    """A cache whose length depends on the samples of a rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = Quantised.training_step(self, batch, batch_idx)
        if batch_idx == 1:
            self.centre += 1
        if batch_idx == 2:
            self.centre = torch.ones(WIDTH + self.global_rank)[:WIDTH] if self.global_rank else torch.ones(1)
        return loss


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS[:2])
def test_a_buffer_of_another_shape_on_each_rank_stays_its_own(layout: str, num_ranks: int) -> None:
    first, second = run_on_ranks(num_ranks, _begins_and_ends, Growing, layout, {"limit_train_batches": 4})
    assert torch.equal(first[0][2]["centre"], second[0][2]["centre"])
    assert torch.equal(first[0][3]["centre"], torch.ones(1))
    assert torch.equal(second[0][3]["centre"], torch.ones(WIDTH))


class Constants(Quantised):
    """Has buffers, of which training writes BatchNorm's only."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.norm(self.blocks(self.stem(batch[0] - self.centre)))), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass


def _collectives(kind: type[Quantised], layout: str) -> list[dict[str, int]]:
    """Of each training step, from its first line to the end of its backward."""
    counts: list[dict[str, int]] = []
    fit(kind(), layout, strategy=counting("optimizer_step", counts)(layout))
    return counts


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS[:3])
def test_only_written_buffers_are_communicated(layout: str, num_ranks: int) -> None:
    for counts in run_on_ranks(num_ranks, _collectives, Constants, layout):
        assert [count.get("broadcast", 0) for count in counts[2:]] == [0, 0]
    for counts in run_on_ranks(num_ranks, _collectives, Quantised, layout):
        assert [count.get("broadcast", 0) for count in counts[2:]] == [2, 2]  # floats and integers


class Scheduled(Quantised):
    """Writes what does not depend on the samples, which is one process's on every rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.quantiser.num_calls += 1
        self.quantiser.sizes = self.quantiser.sizes * 0.9
        logits = self.head(self.blocks(self.stem(batch[0])))
        return F.cross_entropy(logits, batch[1]) * self.quantiser.sizes.sum() / self.quantiser.num_calls

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS[:3])
def test_what_does_not_depend_on_samples_equals_one_process(layout: str, num_ranks: int) -> None:
    run = Run(Scheduled, samples)
    one = one_process(run)
    for record in run_on_ranks(num_ranks, train, run, layout):
        assert_equal(one, record)


class Centred(Quantised):
    """Writes a buffer from the samples, before the network runs."""

    def __init__(self) -> None:
        super().__init__()
        firsts: list[Any] = []
        self.identity, self.note, self.noted = id(self), firsts.append, lambda: firsts  # no microbatch takes them back

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.identity == id(self):  # and not traced
            self.note(self.written())
        self.centre = 0.9 * self.centre + 0.1 * batch[0].mean(0)
        return F.cross_entropy(self.head(self.blocks(self.stem(batch[0]))), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ends.append(self.written())


def _microbatches(layout: str) -> list[tuple[Tensor, Tensor]]:
    """Of each step the buffer at the start of its first microbatch, and at its end."""
    L.seed_everything(1, verbose=False)
    module = Centred()
    fit(module, layout, strategy=HybridStrategy(layout, num_microbatches=2, pipeline_check=False))
    pairs = zip(module.noted()[::2], module.ends, strict=True)
    return [(begin["centre"], end["centre"]) for begin, end in pairs]


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS[3:])
def test_data_ranks_of_a_stage_begin_with_the_first_ones_buffers(layout: str, num_ranks: int) -> None:
    ranks = run_on_ranks(num_ranks, _microbatches, layout)
    for first, second in (ranks[:2], ranks[2:]):
        assert not torch.equal(first[0][1], second[0][1])
        for step in range(1, len(first)):
            assert torch.equal(second[step][0], first[step - 1][1])
