"""Steps whose numbers are bad: all ranks do the same about one, and what is trained is as if it had not been there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_dist import HybridStrategy, Layout, Spikes
from lightning_dist.numbers.spikes import RunningMedian
from tests.faults.numbers import GradientFault, poisoned
from tests.support import models
from tests.support.models import BLOCK_PLAN, samples
from tests.support.parity import QUIET, TOLERANCE, once, slow, whole_weights
from tests.support.ranks import run_on_ranks

LAYOUTS = [
    pytest.param("dp_replicate=2", 2, id="replicate2"),
    pytest.param("dp_shard=2", 2, id="shard2"),
    pytest.param("tp=2", 2, id="tp2"),
    pytest.param("pp=2", 2, id="pp2"),
    slow("dp_shard=2,tp=2", 4),
    slow("pp=2,dp_replicate=2", 4),
]


@dataclass(frozen=True)
class Fit:
    """A training of small batches.

    Args:
        options: of the strategy.
        factors: of samples, see :func:`poisoned`.
        fault: on one rank.
        leaves_out: batches whose step returns None, in one process.
        without: batches that the data does not have.
        trainer: arguments of the Trainer.
        num_samples: of the data.
        averages: whether there is dropout, and what is left are averages over steps.
    """

    options: dict[str, Any] = field(default_factory=dict)
    factors: dict[int, float] = field(default_factory=dict)
    fault: GradientFault | None = None
    leaves_out: tuple[int, ...] = ()
    without: tuple[int, ...] = ()
    trainer: dict[str, Any] = field(default_factory=dict)
    num_samples: int = 64
    averages: bool = False


BATCH = 4


class Noting(Callback):
    """Notes losses, steps and learning rates at the end of each batch."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.steps.append((trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]))


class Leaving(models.Grouped):
    """Skips some batches, as one process may; the loss of a sample grows with its largest value beyond 10."""

    def __init__(self, leaves_out: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        self.leaves_out, self.dropout = leaves_out, nn.Dropout(dropout)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx in self.leaves_out:
            return None
        x, y = batch
        weights = (x.abs().amax(1) / 10).clamp(min=1)
        loss = (F.cross_entropy(self.dropout(self(x)), y, reduction="none") * weights).mean()
        self.log("train/loss", loss)
        return loss


@dataclass
class Left:
    """What a fit left behind, or the error that ended it."""

    steps: list[tuple[int, float]]
    weights: dict[str, Tensor]
    states: list[float]
    bad: list[Any]
    error: str


def fitted(fit: Fit, layout: str | None) -> Left:
    """Trains on the ranks that are there; None is Lightning's own strategy for one process."""
    L.seed_everything(1, verbose=False)
    module = Leaving(fit.leaves_out, 0.2 * fit.averages)
    data: Dataset = poisoned(samples(fit.num_samples), fit.factors)
    kept = [i for i in range(fit.num_samples) if i // BATCH not in fit.without]
    noting, strategy, world, parts = Noting(), None, 1, 1
    if layout is not None:
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        strategy = HybridStrategy(layout, tensor_plan=BLOCK_PLAN if "tp" in layout else None, **fit.options)
        parts = Layout.parse(layout).resolve(world).num_data_ranks
    faults = [] if fit.fault is None else [replace(fit.fault)]
    given = {**QUIET, "max_epochs": 1, "devices": world, "strategy": strategy or "auto", **fit.trainer}
    averaging = [WeightAveraging()] if fit.averages else []
    trainer = L.Trainer(**given, callbacks=[noting, *faults, *averaging])
    error = ""
    try:
        trainer.fit(module, DataLoader(Subset(data, kept), batch_size=BATCH // parts))
    except RuntimeError as raised:
        error = str(raised)
    bad = [] if strategy is None else strategy.bad_steps
    states = [float(s["step"]) for s in trainer.optimizers[0].state.values()] if not error else []
    return Left(noting.steps, {} if error else whole_weights(module), states, bad, error)


def assert_same(left: Left, one: Left) -> None:
    assert not left.error, left.error
    assert left.steps == one.steps
    assert set(left.states) == set(one.states)
    for name, weight in one.weights.items():
        # of a tensor, as everywhere: AdamW makes much of the rounding of a gradient near its eps, which one element of
        # a bias shows on some processors
        difference = (left.weights[name] - weight).norm() / weight.norm()
        assert difference <= TOLERANCE, f"{name}: {difference:.1e}"


# ---------------------------------------------------------------- not finite


@pytest.mark.parametrize(("layout", "num_ranks"), [pytest.param("dp_replicate=1", 1, id="one"), *LAYOUTS])
def test_a_loss_that_is_not_finite_is_no_step_on_any_rank(layout: str, num_ranks: int) -> None:
    """The schedule and the count of steps go on; no parameter, state or count of the optimizer does."""
    fit = Fit({"on_nonfinite": "skip"}, {4 * BATCH + 1: math.nan, 9 * BATCH: math.inf})
    one = once(fitted, Fit(leaves_out=(4, 9)), None)
    everyone = [fitted(fit, layout)] if num_ranks == 1 else run_on_ranks(num_ranks, fitted, fit, layout)
    for left in everyone:
        assert_same(left, one)
        assert [(bad.what, bad.step, bad.batches, bad.did) for bad in left.bad] == [
            ("nonfinite", 4, (4, 4), "skipped"),
            ("nonfinite", 9, (9, 9), "skipped"),
        ]
        assert sorted(index for own in left.bad[0].samples.values() for index in own) == [16, 17, 18, 19]
    assert one.steps[-1][0] == 16
    assert set(one.states) == {14}


@pytest.mark.parametrize("where", ["local", "finished"])
@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
def test_a_gradient_that_is_not_finite_on_one_rank_alone_is_no_step(layout: str, num_ranks: int, where: Any) -> None:
    fit = Fit({"on_nonfinite": "skip"}, fault=GradientFault(num_ranks - 1, 5, "inf", where, seed=3))
    one = once(fitted, Fit(leaves_out=(5,)), None)
    for left in run_on_ranks(num_ranks, fitted, fit, layout):
        assert_same(left, one)
        assert [(bad.what, bad.step) for bad in left.bad] == [("nonfinite", 5)]
        assert math.isfinite(left.bad[0].loss)
        assert not math.isfinite(left.bad[0].norm)


@pytest.mark.parametrize("where", ["local", "finished"])
def test_a_run_may_end_there_with_the_samples_named_on_all_ranks(where: Any) -> None:
    fit = Fit({"on_nonfinite": "raise"}, fault=GradientFault(1, 3, "nan", where))
    for left in run_on_ranks(2, fitted, fit, "dp_shard=2"):
        assert left.error.startswith("numbers that are not finite in step 3 (batch 3 of epoch 0): loss ")
        assert "samples by data rank: 0: [12, 14], 1: [13, 15]; " in left.error
        assert len(left.steps) == 3


def test_accumulated_gradients_are_left_out_together() -> None:
    fit = Fit({"on_nonfinite": "skip"}, {5 * BATCH: math.nan}, trainer={"accumulate_grad_batches": 2})
    one = once(fitted, replace(fit, options={}, factors={}, without=(4, 5)), None)
    for left in run_on_ranks(2, fitted, fit, "dp_replicate=2"):
        assert [bad.batches for bad in left.bad] == [(4, 5)]
        assert left.steps[-1][0] == one.steps[-1][0] + 1
        assert set(left.states) == set(one.states)


def test_what_clips_by_a_norm_that_is_not_finite_is_no_step() -> None:
    fit = Fit({"on_nonfinite": "skip"}, {4 * BATCH: math.nan}, trainer={"gradient_clip_val": 0.1})
    one = once(fitted, Fit(leaves_out=(4,), trainer=fit.trainer), None)
    for left in run_on_ranks(2, fitted, fit, "dp_shard=2"):
        assert_same(left, one)


# ---------------------------------------------------------------- spikes


def test_a_number_far_above_the_median_is_a_spike() -> None:
    running = RunningMedian(Spikes(window=8, warmup=4, threshold=10.0))
    assert not running.is_far_above(1e9)
    for value in (1.0, 1.2, 0.8, 1.1):
        running.add(value)
    middle, spread = 1.05, 1.4826 * 0.1
    assert not running.is_far_above(middle + 9.9 * spread)
    assert running.is_far_above(middle + 10.1 * spread)
    assert running.is_far_above(math.nan)
    running.add(1e9)  # one outlier moves neither
    assert not running.is_far_above(1.2)
    assert running.is_far_above(1e3)


def test_numbers_that_hardly_differ_have_a_spread_all_the_same() -> None:
    running = RunningMedian(Spikes(warmup=2))
    running.add(1.0)
    running.add(1.0)
    assert not running.is_far_above(1.19)
    assert running.is_far_above(1.21)


SPIKES = Spikes(then="report", warmup=5, threshold=20.0)


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS[:1])
def test_a_spike_is_reported_and_trained_on(layout: str, num_ranks: int) -> None:
    fit = Fit({"on_spike": SPIKES}, {12 * BATCH + 1: 1e4})
    one = once(fitted, replace(fit, options={}), None)
    for left in run_on_ranks(num_ranks, fitted, fit, layout):
        assert_same(left, one)
        assert [(bad.what, bad.step, bad.did) for bad in left.bad] == [("spike", 12, "trained")]
        assert left.bad[0].samples == {0: [48, 50], 1: [49, 51]}


@pytest.mark.parametrize(("layout", "num_ranks"), [pytest.param("dp_replicate=1", 1, id="one"), *LAYOUTS])
def test_after_a_rewind_training_is_as_if_the_batches_since_had_not_been(layout: str, num_ranks: int) -> None:
    """States of the optimizer, the schedule and the count of steps are those of the good state too."""
    spikes = replace(SPIKES, then="rewind", every_n_steps=4)
    fit = Fit({"on_spike": spikes}, {12 * BATCH + 1: 1e4}, num_samples=96)
    one = once(fitted, Fit(without=(9, 10, 11, 12), num_samples=96), None)
    everyone = [fitted(fit, layout)] if num_ranks == 1 else run_on_ranks(num_ranks, fitted, fit, layout)
    for left in everyone:
        assert [(bad.what, bad.step, bad.did, bad.back_to) for bad in left.bad] == [("spike", 12, "rewound", 9)]
        assert_same(replace(left, steps=left.steps[:9] + left.steps[13:]), one)


def test_random_states_and_averages_go_back_too() -> None:
    spikes = replace(SPIKES, then="rewind", every_n_steps=4)
    fit = Fit({"on_spike": spikes}, {12 * BATCH + 1: 1e4}, num_samples=96, averages=True)
    without = Fit(without=(9, 10, 11, 12), num_samples=96, averages=True)
    left, one = fitted(fit, "dp_replicate=1"), fitted(without, "dp_replicate=1")
    assert [bad.did for bad in left.bad] == ["rewound"]
    assert left.steps[-1] == one.steps[-1]
    for name, weight in one.weights.items():
        assert torch.equal(left.weights[name], weight), name


def test_a_level_that_stays_is_no_spike() -> None:
    """After three rewinds in a row it is trained on, and the median begins anew."""
    spikes = replace(SPIKES, then="rewind", every_n_steps=2, window=8)
    fit = Fit({"on_spike": spikes}, dict.fromkeys(range(12 * BATCH, 24 * BATCH), 1e3), num_samples=96)
    left = fitted(fit, "dp_replicate=1")
    assert not left.error
    assert [bad.did for bad in left.bad[:4]] == ["rewound", "rewound", "rewound", "trained"]
    assert [bad.batches[0] for bad in left.bad[:4]] == [12, 13, 14, 15]
    assert 16 not in [bad.batches[0] for bad in left.bad]


def test_a_training_that_has_no_finite_numbers_any_more_ends() -> None:
    fit = Fit({"on_spike": replace(SPIKES, then="rewind")}, dict.fromkeys(range(12 * BATCH, 64), math.nan))
    left = fitted(fit, "dp_replicate=1")
    assert left.error.startswith("numbers that are not finite, after 3 rewinds in a row, in step ")
    assert [bad.did for bad in left.bad[:3]] == ["rewound", "rewound", "rewound"]


# ---------------------------------------------------------------- other ways to train


class TwoOptimizers(models.Classifier):
    """Steps two optimizers by hand, of which one is given no numbers in its second step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(x), y))
        if batch_idx == 1:
            self.net.head.weight.grad[0, 0] = math.nan  # type: ignore[union-attr,index]
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        head, rest = self.net.head.parameters(), [p for n, p in self.named_parameters() if "head" not in n]  # type: ignore[union-attr]
        return torch.optim.AdamW(rest, 1e-2), torch.optim.AdamW(head, 1e-2)


def test_each_of_several_optimizers_is_kept_from_its_own_bad_steps() -> None:
    strategy = HybridStrategy("dp_replicate=1", on_nonfinite="skip")
    trainer = L.Trainer(**QUIET, max_epochs=1, strategy=strategy)
    trainer.fit(TwoOptimizers(), DataLoader(samples(16), batch_size=BATCH))
    steps = [{int(s["step"]) for s in optimizer.state.values()} for optimizer in trainer.optimizers]
    assert steps == [{4}, {3}]
    assert [(bad.what, bad.batches) for bad in strategy.bad_steps] == [("nonfinite", (1, 1))]


def test_a_step_that_a_scaler_leaves_out_is_the_scalers() -> None:
    """And its loss is not added to the next step's."""
    fit = Fit({"on_nonfinite": "skip", "on_spike": replace(SPIKES, threshold=5.0)}, {12 * BATCH: math.nan})
    plugins = [MixedPrecision("16-mixed", "cpu", GradScaler("cpu", 2.0**10))]
    left = fitted(replace(fit, trainer={"plugins": plugins}), "dp_replicate=1")
    assert not left.bad
    assert set(left.states) == {15}
    assert plugins[0].scaler.get_scale() == 2.0**9


class TwiceEvaluating(torch.optim.SGD):
    """Evaluates its closure twice, as those that look ahead do."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


class Configured(models.Classifier):
    """Trained by another optimizer."""

    def __init__(self, kind: Any, manual: bool = False) -> None:
        super().__init__()
        self.kind, self.automatic_optimization = kind, not manual

    def configure_optimizers(self) -> Any:
        return self.kind(self.parameters(), lr=1e-2)


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [
        ({"on_nonfinite": "skip"}, Configured(torch.optim.LBFGS), "LBFGS evaluates it several times in a step"),
        ({"replay_every_n_steps": 2}, Configured(torch.optim.LBFGS), "LBFGS evaluates it several times in a step"),
        ({"on_nonfinite": "raise"}, Configured(TwiceEvaluating), "TwiceEvaluating evaluates its closure several times"),
        ({"on_spike": "rewind"}, Configured(torch.optim.SGD, True), "on_spike='rewind' under manual optimization"),
        ({"replay_every_n_steps": 2}, Configured(torch.optim.SGD, True), "replay_every_n_steps under manual"),
    ],
)
def test_what_can_not_be_looked_at_is_refused(options: Any, module: Any, message: str) -> None:
    trainer = L.Trainer(**QUIET, max_epochs=1, strategy=HybridStrategy("dp_replicate=1", **options))
    with pytest.raises((ValueError, RuntimeError), match=message):
        trainer.fit(module, DataLoader(samples(8), batch_size=BATCH))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_nonfinite": "stop"}, "on_nonfinite='stop' is none of 'train', 'skip', 'raise'"),
        ({"on_spike": "back"}, "on_spike='back' is none of"),
        ({"replay_every_n_steps": 0}, "replay_every_n_steps=0 must be a number of steps"),
    ],
)
def test_options_that_are_none_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HybridStrategy(**options)
    with pytest.raises(ValueError, match="must be a number of steps, at least 1"):
        Spikes(window=0)
