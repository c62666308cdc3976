"""Gradients of a pipeline's stages: what they take of memory, and when and in which order they are averaged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from lightning_dist import HybridStrategy
from lightning_dist.parallel.pipeline import gradient_averaging
from lightning_dist.parallel.pipeline.gradient_averaging import GradientAveraging
from lightning_dist.parallel.pipeline.runner import MOST_SCHEDULES
from tests.support import models
from tests.support.memory import LiveBytes
from tests.support.models import CLASSES, WIDTH, samples
from tests.support.parity import QUIET, Run, assert_parity
from tests.support.ranks import run_on_ranks

CPU = torch.device("cpu")
LARGE = 4096 * WIDTH * 4
"""Bytes of each of the large parameters below."""


class Wide(models.Classifier):
    """Two large blocks; activations are small beside their parameters."""

    def __init__(self) -> None:
        super().__init__()
        wide = (nn.Sequential(nn.Linear(WIDTH, 4096), nn.ReLU(), nn.Linear(4096, WIDTH)) for _ in range(2))
        self.net = nn.Sequential(*wide, nn.Linear(WIDTH, CLASSES))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-2)


class Measuring(L.Callback):
    """Counts the memory that steps take beside parameters, from the second step on (ranks compare copies before)."""

    def __init__(self) -> None:
        self.live, self.is_open = LiveBytes(LARGE), False

    def on_train_batch_end(self, *args: Any) -> None:
        self.on_train_end()
        self.live.__enter__()
        self.is_open = True

    def on_train_end(self, *args: Any) -> None:
        if self.is_open:
            self.live.__exit__(None, None, None)
            self.is_open = False


def _peak(layout: str, accumulate: int) -> int:
    measuring = Measuring()
    trainer = L.Trainer(
        **{**QUIET, "max_epochs": 1, "limit_train_batches": 4, "accumulate_grad_batches": accumulate},
        devices=dist.get_world_size(),
        strategy=HybridStrategy(layout, pipeline_cuts=["net.0"], num_microbatches=2),
        callbacks=[measuring],
    )
    trainer.fit(Wide(), DataLoader(samples(), batch_size=4))
    return measuring.live.peak


@pytest.mark.parametrize(
    ("layout", "num_ranks", "accumulate"),
    [("pp=2", 2, 2), ("pp=2,dp_replicate=2", 4, 1), pytest.param("pp=2,dp_replicate=2", 4, 2, marks=pytest.mark.slow)],
)
def test_gradients_take_their_own_memory_once(layout: str, num_ranks: int, accumulate: int) -> None:
    """Each stage has two large ones; beside them is the one that the backward of a microbatch is about to add."""
    assert run_on_ranks(num_ranks, _peak, layout, accumulate) == [3 * LARGE] * num_ranks


# ---------------------------------------------------------------- averaging


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Tensor]]]:
    """What all-reduces were begun with, on a rank of two; every tensor is a bucket."""
    seen: list[list[Tensor]] = []
    own = gradient_averaging.begin_all_reduce

    def noted(tensors: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.append(tensors)
        return own(tensors, *args, **kwargs)

    monkeypatch.setattr(gradient_averaging, "begin_all_reduce", noted)
    monkeypatch.setattr(gradient_averaging, "BUCKET_BYTES", 1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield seen
    dist.destroy_process_group()


def _averaging() -> GradientAveraging:
    assert dist.group.WORLD is not None
    return GradientAveraging(dist.group.WORLD, CPU)


def _places(begun: list[list[Tensor]], parameters: list[nn.Parameter]) -> list[int]:
    """Numbers of the parameters of each bucket, one has one."""
    memory = {p.grad.data_ptr(): number for number, p in enumerate(parameters) if p.grad is not None}
    return [memory[tensors[0].data_ptr()] for tensors in begun]


def test_buckets_are_begun_in_one_order_whichever_stage_ends_first(begun: list[list[Tensor]]) -> None:
    for order in ([3, 1], [1, 3]):
        begun.clear()
        parameters = [nn.Parameter(torch.ones(2 + number)) for number in range(5)]
        averaging = _averaging()
        averaging.begin({1: parameters[:2], 3: parameters[2:4]})
        for stage in order:
            with averaging.last_backward(stage):
                sum(p.sum() for p in (parameters[:2] if stage == 1 else parameters[2:])).backward()
        assert len(begun) == 3
        averaging.finish(parameters)
        assert _places(begun, parameters) == [3, 2, 1, 0, 4]
        assert [len(tensors) for tensors in begun] == [1, 1, 1, 1, 2]  # the last one with the flags


class Deep(nn.Module):
    """Notes how many buckets were begun when a layer's backward is reached; ``reentrant`` shares one of the layers."""

    def __init__(self, begun: list[Any], reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(4))
        self.begun, self.reentrant, self.seen = begun, reentrant, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant:
            for _ in range(2):
                x = checkpoint(self.layers[0], x, use_reentrant=True)
        for layer in self.layers:
            x = layer(x)
            x.register_hook(lambda _: self.seen.append(len(self.begun)))
        return x


@pytest.mark.parametrize("reentrant", [False, True], ids=["at-once", "in-parts"])
def test_a_bucket_is_begun_while_the_backward_runs(begun: list[list[Tensor]], reentrant: bool) -> None:
    """In the first step it is seen how gradients come: one that comes in parts may not be sent after the first."""
    averaging, net = _averaging(), Deep(begun, reentrant)
    for _ in range(2):
        begun.clear()
        net.seen.clear()
        parameters = list(net.parameters())
        averaging.begin({0: parameters})
        with averaging.last_backward(0):
            net(torch.ones(1, 2, requires_grad=True)).sum().backward()
        assert len(begun) == 3
        averaging.finish(parameters)
    assert net.seen == ([0, 0, 0, 0] if reentrant else [0, 1, 2, 3])


def _used(rank_of: list[set[int]]) -> tuple[list[Any], int]:
    """The averages of parameters, each used by some ranks; how often this rank's host looked at a flag."""
    parameters = [nn.Parameter(torch.ones(2)) for _ in rank_of]
    rank, looks = dist.get_rank(), 0
    averaging = _averaging()
    own = Tensor.tolist

    def looking(self: Tensor) -> Any:
        nonlocal looks
        looks += 1
        return own(self)

    for p, ranks in zip(parameters, rank_of, strict=True):
        if rank in ranks:
            p.grad = torch.full_like(p, 1.0 + rank)
    Tensor.tolist = looking  # type: ignore[method-assign]
    try:
        averaging.finish(parameters)
    finally:
        Tensor.tolist = own  # type: ignore[method-assign]
    return [None if p.grad is None else p.grad.tolist() for p in parameters], looks


def test_what_no_rank_used_has_no_gradient_and_only_ranks_without_one_look() -> None:
    first, second = run_on_ranks(2, _used, [{0, 1}, {0}, set()])
    assert first[0] == second[0] == [[1.5, 1.5], [0.5, 0.5], None]
    first, second = run_on_ranks(2, _used, [{0, 1}, {0}])
    assert (first[1], second[1]) == (0, 1)


# ---------------------------------------------------------------- shapes of batches


class Growing(Dataset):
    """Sequences, longer in each of the batches of eight, and then short again."""

    def __len__(self) -> int:
        return 8 * 2 * (MOST_SCHEDULES + 1)

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(1 + index // 8 % (MOST_SCHEDULES + 1), WIDTH, generator=generator)


class Lengths(L.LightningModule):
    """Trains on sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch), batch)

    def on_train_end(self) -> None:
        if self.trainer.world_size > 1:
            assert len(self.trainer.strategy.parts.module_setup.runner._schedules) == MOST_SCHEDULES

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_the_schedules_of_the_last_shapes_are_kept() -> None:
    assert_parity(Run(Lengths, Growing), "pp=2", 2)
