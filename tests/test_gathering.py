"""What a step gathers from other ranks: every sample once, and a user's own collectives over the world are told of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor
from torch.distributed import all_gather as imported_early
from torch.distributed import distributed_c10d
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy, Layout
from tests.support.models import WIDTH, Classifier, samples, wide_samples
from tests.support.parity import QUIET, Run, assert_parity
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

LAYOUTS = [
    ("dp_replicate=2", 2),
    ("dp_shard=2", 2),
    ("tp=2", 2),
    pytest.param("dp_shard=2,tp=2", 4, marks=pytest.mark.slow),
    pytest.param("dp_replicate=2,dp_shard=2", 4, marks=pytest.mark.slow),
]


class FeedForward(torch.nn.Module):
    """That tp divides."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(WIDTH, 24), torch.nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Contrastive(Classifier):
    """SimCLR: every sample against all others of the batch, wherever they are."""

    def __init__(self) -> None:
        super().__init__(lr=1e-2)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, WIDTH), FeedForward(), FeedForward(), torch.nn.Linear(WIDTH, 8)
        )
        self.log_scale = torch.nn.Parameter(torch.zeros(1))

    def _views(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, _ = batch
        first, second = self.net(x), self.net(x.roll(1, -1))
        return F.normalize(first, dim=-1), F.normalize(second, dim=-1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = self._views(batch)
        together = self.all_gather({"views": [first, second], "rank": torch.tensor(0)}, sync_grads=True)
        first, second = (view.reshape(-1, view.shape[-1]) for view in together["views"])
        loss = self._loss(first, second, torch.arange(len(first)))
        self.log("train/loss", loss)
        self.log("train/rows", float(len(first)))
        return loss

    def _loss(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        logits = first @ second.T * self.log_scale.exp()
        return F.cross_entropy(logits, labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Local(Contrastive):
    """CLIP with a local loss: each rank scores its own rows against all columns."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = self._views(batch)
        columns = self.all_gather(second, sync_grads=True).reshape(-1, second.shape[-1])
        rank = getattr(self.trainer.strategy, "data_rank", 0)
        loss = self._loss(first, columns, torch.arange(len(first)) + rank * len(first))
        self.log("train/loss", loss)
        return loss


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
@pytest.mark.parametrize("module", [Contrastive, Local])
def test_a_loss_of_all_samples_equals_one_process(
    module: Callable[[], L.LightningModule], layout: str, num_ranks: int
) -> None:
    # in float64: Adam makes much of the rounding of gradients that are nearly zero
    assert_parity(Run(module, wide_samples, trainer={"max_steps": 6, "precision": "64-true"}), layout, num_ranks)


class Probing(Contrastive):
    """Does something with torch.distributed in a step."""

    def __init__(self, call: str, where: str = "training_step") -> None:
        super().__init__()
        self.call, self.where = call, where

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.where == "training_step":
            CALLS[self.call](self)
        return self.net(batch[0]).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        if self.where == "hook":
            CALLS[self.call](self)


def _list() -> list[Tensor]:
    return [torch.zeros(1) for _ in range(2)]


CALLS: dict[str, Callable[[Any], Any]] = {
    "all_gather": lambda _: dist.all_gather(_list(), torch.ones(1)),
    "imported early": lambda _: imported_early(_list(), torch.ones(1)),
    "the world by name": lambda _: dist.all_gather(_list(), torch.ones(1), group=dist.group.WORLD),
    "all_gather_into_tensor": lambda _: dist.all_gather_into_tensor(torch.zeros(2), torch.ones(1)),
    "all_gather_object": lambda _: dist.all_gather_object([None, None], 1),
    "differentiable": lambda _: torch.distributed.nn.functional.all_gather(torch.ones(1)),
    "reduce_scatter": lambda _: dist.reduce_scatter_tensor(torch.zeros(1), torch.ones(2)),
    "all_reduce": lambda _: dist.all_reduce(torch.ones(1)),
    "differentiable sum": lambda _: torch.distributed.nn.functional.all_reduce(torch.ones(1)),
    "get_world_size": lambda _: dist.get_world_size(),
    "get_rank": lambda _: dist.get_rank(),
    "trainer.world_size": lambda module: module.trainer.world_size,
    "labels": lambda module: (module.all_gather(torch.ones(1)), module.global_rank),
    # none of these counts samples
    "maximum": lambda _: dist.all_reduce(torch.ones(1), dist.ReduceOp.MAX),
    "barrier": lambda _: dist.barrier(),
    "broadcast": lambda _: dist.broadcast(torch.ones(1), 0),
    "data group": lambda module: dist.all_gather([torch.zeros(1)], torch.ones(1), module.trainer.strategy.data_group),
    "self.all_gather": lambda module: module.all_gather(torch.ones(1)),
    "first rank": lambda module: module.global_rank == 0 and module.trainer.is_global_zero,
    "log": lambda module: module.log("x", 1.0, sync_dist=True, on_epoch=True),
}
REFUSED = [*list(CALLS)[:7]]
TOLD = [*list(CALLS)[7:13]]
QUIETLY = [*list(CALLS)[13:]]


def _probe(calls: list[str], layout: str, where: str = "training_step") -> dict[str, list[str]]:
    told = {}
    plain = distributed_c10d._rank_not_in_group
    for call in calls:
        trainer = L.Trainer(**QUIET, max_steps=3, devices=2, strategy=HybridStrategy(Layout.parse(layout)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                trainer.fit(Probing(call, where), DataLoader(samples(), batch_size=4))  # type: ignore[arg-type]
            except ValueError as error:
                told[call] = [f"refused: {error}"]
            else:
                told[call] = [str(w.message) for w in caught if "see the same samples" in str(w.message)]
        assert distributed_c10d._rank_not_in_group is plain
    return told


def test_gathers_of_ones_own_over_the_world_are_refused_in_a_step() -> None:
    for told in run_on_ranks(2, _probe, REFUSED, "tp=2"):
        for call, (message,) in told.items():
            assert message.startswith("refused: torch.distributed."), call
            assert (
                "under layout tp=2: the ranks of tp=2 see the same samples, so each sample is there 2 times" in message
            )
            assert "Use self.all_gather" in message


def test_sums_and_sizes_of_the_world_are_told_of_once() -> None:
    told, _ = run_on_ranks(2, _probe, TOLD, "tp=2")
    for call, messages in told.items():
        assert len(messages) == 1, (call, messages)
        assert "data_rank" in messages[0] or "strategy.reduce" in messages[0]


def test_what_counts_no_sample_is_not_told_of() -> None:
    for told in run_on_ranks(2, _probe, QUIETLY, "tp=2"):
        assert told == {call: [] for call in QUIETLY}


def test_in_other_hooks_gathers_are_told_of_and_go_on() -> None:
    told, _ = run_on_ranks(2, _probe, ["all_gather"], "tp=2", "hook")
    assert len(told["all_gather"]) == 1
    assert not told["all_gather"][0].startswith("refused")


def test_where_all_ranks_see_other_samples_nothing_is_told() -> None:
    for told in run_on_ranks(2, _probe, ["all_gather", "all_reduce", "get_world_size", "labels"], "dp_replicate=2"):
        assert not any(told.values())


def _shapes() -> list[Any]:
    found = []
    for layout in ("dp_replicate=2", "tp=2"):
        strategy = HybridStrategy(Layout.parse(layout))
        module = Shaped()
        trainer = L.Trainer(**QUIET, max_steps=1, devices=2, strategy=strategy)
        trainer.fit(module, DataLoader(samples(), batch_size=4))  # type: ignore[arg-type]
        found.append(module.shapes)
    return found


class Shaped(Contrastive):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.net(batch[0]).square().mean()
        gathered = self.all_gather({"rows": batch[0], "one": loss.detach(), "number": 3.0})
        self.shapes = {name: tuple(value.shape) for name, value in gathered.items()}
        return loss


def test_what_is_gathered_has_one_dimension_more_of_data_ranks() -> None:
    for shapes in run_on_ranks(2, _shapes):
        assert shapes == [
            {"rows": (2, 4, WIDTH), "one": (2,), "number": (2,)},
            {"rows": (1, 4, WIDTH), "one": (1,), "number": (1,)},
        ]
