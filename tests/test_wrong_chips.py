"""A rank that computes wrong numbers is named before an optimizer takes them; one that does not is left alone."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy, Layout
from lightning_dist.numbers.digests import digest
from lightning_dist.numbers.kept_step import is_close
from lightning_dist.numbers.verdict import Row, judge, told
from lightning_dist.trainer.replay import Replay
from tests.faults.numbers import GradientFault
from tests.support import models
from tests.support.models import BLOCK_PLAN, samples
from tests.support.parity import QUIET, slow, whole_weights
from tests.support.ranks import run_on_ranks

LAYOUTS = [
    pytest.param("dp_replicate=2", 2, id="replicate2"),
    pytest.param("dp_shard=2", 2, id="shard2"),
    pytest.param("tp=2", 2, id="tp2"),
    pytest.param("pp=2", 2, id="pp2"),
    slow("dp_replicate=2,dp_shard=2", 4),
    slow("dp_shard=2,tp=2", 4),
    slow("pp=2,dp_replicate=2", 4),
    slow("pp=2,tp=2", 4),
]


class Counting(models.Grouped):
    """Its steps draw from every generator, and keep what a replay might change.

    Args:
        of_batches: whether also what microbatches do otherwise.
    """

    def __init__(self, of_batches: bool) -> None:
        super().__init__()
        self.of_batches = of_batches
        self.noise = torch.Generator().manual_seed(5)
        self.dropout = nn.Dropout(0.1)
        self.bn: nn.Module = nn.BatchNorm1d(models.WIDTH) if of_batches else nn.Identity()
        self.num_steps, self.seen, self.sum_of = 0, [], {"x": 0.0}
        self.largest = torch.zeros(())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.of_batches:
            x += 0.1 * torch.randn(x.shape, generator=self.noise) + random.random()  # in place
        self.num_steps += 1
        self.seen.append(batch_idx)
        self.sum_of["x"] += 1.0
        self.largest += 1
        logits = self(self.dropout(self.bn(x)))
        loss = F.cross_entropy(logits, y)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log("train/count", 1.0, reduce_fx="sum", on_step=False, on_epoch=True)
        self.accuracy(logits, y)
        self.log("train/accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss


@dataclass(frozen=True)
class Fit:
    """A training; ``every`` is the option, and faults are of single ranks."""

    every: int | None
    faults: tuple[GradientFault, ...] = ()
    of_batches: bool = False
    scales: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass
class Left:
    """What a fit left behind, or the error that ended it and the weights before."""

    weights: dict[str, Tensor]
    logged: dict[str, float]
    kept: tuple[Any, ...]
    draws: list[float]
    error: str
    step: int
    num_done: int


def fitted(fit: Fit, layout: str) -> Left:
    """Trains on the ranks that are there."""
    L.seed_everything(1, verbose=False)
    module = Counting(fit.of_batches)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    plan = BLOCK_PLAN if "tp" in layout else None
    strategy = HybridStrategy(
        layout, tensor_plan=plan, replay_every_n_steps=fit.every, pipeline_check="pp" not in layout
    )
    faults = [replace(fault) for fault in fit.faults]
    given = {**QUIET, "max_epochs": 1, "devices": world, "strategy": strategy, "callbacks": faults, **fit.trainer}
    plugins = [MixedPrecision("16-mixed", "cpu", GradScaler("cpu"))] if fit.scales else None
    trainer = L.Trainer(**given, plugins=plugins)
    error = ""
    loader = DataLoader(samples(32), batch_size=8 // Layout.parse(layout).resolve(world).num_data_ranks)
    try:
        trainer.fit(module, loader)
    except RuntimeError as raised:
        error = str(raised)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    kept = module.num_steps, module.seen, module.sum_of, float(module.largest)
    draws = [float(torch.rand(())), random.random(), float(torch.rand((), generator=module.noise))]
    weights = {} if error else whole_weights(module)
    return Left(weights, logged, kept, draws, error, trainer.global_step, sum(fault.num_done for fault in faults))


def _on(num_ranks: int, fit: Fit, layout: str) -> list[Left]:
    return [fitted(fit, layout)] if num_ranks == 1 else run_on_ranks(num_ranks, fitted, fit, layout)


# ---------------------------------------------------------------- nothing is wrong


@pytest.mark.parametrize("accumulate", [1, slow(2)])
@pytest.mark.parametrize(("layout", "num_ranks"), [pytest.param("dp_replicate=1", 1, id="one"), *LAYOUTS])
def test_a_replay_changes_nothing(layout: str, num_ranks: int, accumulate: int) -> None:
    """Weights, logs, generators, buffers and the module's own attributes are those of a run without, bit for bit."""
    of_trainer = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    without = Fit(None, of_batches="pp" not in layout, trainer=of_trainer)
    pairs = zip(_on(num_ranks, replace(without, every=1), layout), _on(num_ranks, without, layout), strict=True)
    for left, plain in pairs:
        assert not left.error, left.error
        assert (left.logged, left.kept, left.draws, left.step) == (plain.logged, plain.kept, plain.draws, plain.step)
        for name, weight in plain.weights.items():
            assert torch.equal(left.weights[name], weight), name


@pytest.mark.parametrize(
    ("layout", "num_ranks"), [("dp_replicate=1", 1), slow("dp_shard=2", 2), slow("tp=2", 2), slow("pp=2", 2)]
)
def test_a_scaled_loss_is_scaled_again(layout: str, num_ranks: int) -> None:
    for left in _on(num_ranks, Fit(1, scales=True), layout):
        assert not left.error, left.error
        assert left.step == 4


def test_accumulated_steps_are_computed_again_together() -> None:
    fit = Fit(2, (GradientFault(1, 3, "flip", "local"),), trainer={"accumulate_grad_batches": 2, "max_epochs": 2})
    for left in _on(2, fit, "dp_shard=2"):
        assert left.error.startswith("rank 1 (host ")
        assert "computed step 3 differently twice" in left.error
        assert (left.step, left.kept[0]) == (3, 8)


# ---------------------------------------------------------------- a flipped bit


@pytest.mark.parametrize("where", ["local", "finished"])
@pytest.mark.parametrize(("layout", "num_ranks"), [pytest.param("dp_replicate=1", 1, id="one"), *LAYOUTS])
def test_a_flipped_bit_is_named_before_the_optimizer_takes_it(layout: str, num_ranks: int, where: Any) -> None:
    rank = num_ranks - 1
    fit = Fit(1, (GradientFault(rank, 2, "flip", where, seed=num_ranks),))
    everyone = _on(num_ranks, fit, layout)
    assert sum(left.num_done for left in everyone) == 1
    for left in everyone:
        assert left.error.startswith(f"rank {rank} (host "), left.error
        assert "computed step 2 differently twice: its " in left.error
        assert left.step == 2


def test_a_parameter_that_one_copy_has_other_is_named_by_the_majority() -> None:
    for left in _on(3, Fit(2, (GradientFault(1, 3, "flip", "parameter"),)), "dp_replicate=3"):
        assert left.error.startswith("rank 1 (host "), left.error
        assert "holds other parameters in step 3 than ranks 0, 2, along dp_replicate" in left.error


@pytest.mark.parametrize(("layout", "axis"), [("dp_replicate=2", "dp_replicate"), slow("tp=2", "tp")])
def test_of_two_copies_that_differ_both_are_named(layout: str, axis: str) -> None:
    for left in _on(2, Fit(2, (GradientFault(1, 3, "flip", "parameter"),)), layout):
        assert left.error.startswith("ranks 0 (host "), left.error
        assert f"should hold the same parameters in step 3, along {axis}, and do not" in left.error


# ---------------------------------------------------------------- who is named


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.int64])
def test_every_flipped_bit_changes_a_digest(dtype: torch.dtype) -> None:
    tensors = [torch.randn(5).to(dtype), torch.ones((), dtype=dtype), torch.randn(4, 6).to(dtype)[:, ::2]]
    before = int(digest(tensors))
    for tensor in tensors:
        real = torch.view_as_real(tensor) if dtype.is_complex else tensor
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[real.element_size()]
        bits = real.reshape(1).view(kind) if not real.ndim else real.view(kind)
        place = (0,) * bits.ndim
        for bit in range(8 * real.element_size() - 1):
            bits[place] ^= 1 << bit
            assert int(digest(tensors)) != before
            bits[place] ^= 1 << bit
    assert int(digest(tensors)) == before


def test_numbers_of_kernels_that_add_in_any_order_are_compared_within_rounding() -> None:
    one = torch.tensor([1.0, -2.0, math.nan, math.inf, 0.0])
    assert is_close(one, one)
    assert is_close(one + 1e-3, one)
    assert not is_close(one + 1e-2, one)
    assert not is_close(one, one.nan_to_num(nan=0.0))
    assert not is_close(one.nan_to_num(posinf=0.0), one)


def test_they_are_compared_so_where_torch_is_not_told_to_be_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a flipped exponent is seen, a last bit is not."""
    monkeypatch.setattr(Replay, "_is_exact", False)
    assert not fitted(Fit(1, of_batches=True), "dp_replicate=1").error
    flips = [fitted(Fit(1, (GradientFault(0, 2, "flip", "local", seed=seed),)), "dp_replicate=1") for seed in range(8)]
    seen = ["computed step 2 differently twice" in left.error for left in flips]
    assert any(seen)
    assert not all(seen)


def _rows(*, local: Any = (), final: Any = (), loss: Any = (), parameters: Any = (1, 1, 1, 1)) -> list[Row]:
    return [Row(i in loss, i in local, i in final, (p, 0, 0), (0, 0, 0)) for i, p in enumerate(parameters)]


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (_rows(), None),
        (_rows(local={2}, final={0, 1, 2, 3}, loss={2}), [2]),
        (_rows(final={1}), [1]),
        (_rows(loss={0, 1}), [0, 1]),
        (_rows(parameters=(1, 1, 5, 1)), [2]),
        (_rows(parameters=(1, 1, 5, 5)), [0, 1, 2, 3]),
        (_rows(parameters=(1, 1, 5, 1), final={3}), [3]),
    ],
)
def test_who_is_named(rows: list[Row], named: list[int] | None) -> None:
    verdict = judge(rows, [("dp_replicate", [[0, 1, 2, 3]])])
    assert (None if verdict is None else verdict.ranks) == named
    if verdict is not None:
        sentence = told(verdict, 40, ["a", "b", "c", "d"])
        assert all(f"{rank} (host {'abcd'[rank]})" in sentence for rank in named or ())
        assert "step 40" in sentence
