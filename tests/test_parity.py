"""Every layout of the data axes gives the numbers of one process."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping

from tests.support import models
from tests.support.models import few_samples, samples
from tests.support.parity import Run, assert_equal, assert_parity, in_turn, on_layout, once, one_process, slow, train
from tests.support.ranks import RankError, run_on_ranks

LAYOUTS = [pytest.param("dp_replicate=2", 2, id="replicate2"), pytest.param("dp_shard=2", 2, id="shard2")]
HYBRID = pytest.param("dp_replicate=2,dp_shard=2", 4, id="replicate2-shard2", marks=pytest.mark.slow)

CASES: dict[str, Run] = {
    "two-epochs": Run(models.Classifier, samples, few_samples, trainer={"max_epochs": 2}),
    "momentum": Run(models.Momentum, samples),
    "param-groups-and-schedule": Run(models.Grouped, samples),
    "plateau-scheduler": Run(models.Plateau, samples, few_samples, trainer={"max_epochs": 5}),
    "clip-norm": Run(models.Classifier, samples, trainer={"gradient_clip_val": 0.1}),
    "clip-value": Run(
        models.Classifier, samples, trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    ),
    "accumulate-and-clip": Run(
        models.Grouped, samples, trainer={"accumulate_grad_batches": 3, "gradient_clip_val": 0.1, "max_epochs": 2}
    ),
    "tied": Run(models.Tied, samples),
    "tied-blocks": Run(models.TiedBlocks, samples),
    "frozen": Run(models.Frozen, samples),
    "unused": Run(models.UnusedInside, samples, trainer={"gradient_clip_val": 0.1}),
    "thawing": Run(models.Thawing, samples, trainer={"max_epochs": 2}),
    "by-parts": Run(models.ByParts, samples, few_samples),
    "scalar-parameter": Run(models.Scaled, samples, trainer={"gradient_clip_val": 0.1}),
    "alternating-micro-steps": Run(models.Alternating, samples, trainer={"accumulate_grad_batches": 2}),
    "used-by-one-rank-only": Run(models.Routed, models.sorted_samples, trainer={"gradient_clip_val": 0.1}),
    "called-in-hooks": Run(models.Sampling, samples, few_samples),
    "layers-in-the-lightning-module": Run(models.Flat, samples, few_samples),
    "gradient-norms-in-a-hook": Run(models.GradientNorms, samples, trainer={"gradient_clip_val": 0.1}),
    "manual-two-optimizers": Run(models.Adversarial, samples),
    "double": Run(models.Classifier, models.wide_samples, trainer={"precision": "64-true"}),
    "max-steps": Run(models.Classifier, samples, trainer={"max_steps": 5, "max_epochs": -1}),
    "limited": Run(models.Classifier, samples, trainer={"limit_train_batches": 3, "max_epochs": 2}),
}


@pytest.mark.parametrize(("case", "layout", "num_ranks"), in_turn(CASES, LAYOUTS))
def test_training_equals_one_process(case: str, layout: str, num_ranks: int) -> None:
    assert_parity(CASES[case], layout, num_ranks)


@pytest.mark.parametrize("case", ["accumulate-and-clip", *map(slow, ("two-epochs", "tied", "manual-two-optimizers"))])
def test_hybrid_shard_equals_one_process(case: str) -> None:
    assert_parity(CASES[case], "dp_replicate=2,dp_shard=2", 4)


def test_uneven_shards_equal_one_process() -> None:
    """Four shards of parameters whose first axis has 3, 4, 16 rows."""
    assert_parity(CASES["unused"], "dp_shard=4", 4)


def test_uneven_last_batch_is_filled_up_as_in_ddp() -> None:
    run = Run(models.Momentum, few_samples, batch_size=4)
    ddp = run_on_ranks(2, _train_ddp, run)[0]
    ddp.logged.clear()  # without sync_dist, Lightning's ddp logs rank 0's own values
    for layout in ("dp_replicate=2", "dp_shard=2"):
        ours = on_layout(run, layout, 2)[0]
        ours.logged.clear()
        assert_equal(ddp, ours)


def _train_ddp(run: Run) -> Any:
    return train(run, "ddp")


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_16_bit_training_stays_within_its_rounding(precision: str, layout: str, num_ranks: int) -> None:
    run = Run(models.Momentum, samples, trainer={"precision": precision})
    assert_parity(run, layout, num_ranks, tolerance=0.03)


@pytest.mark.parametrize(("layout", "num_ranks"), [*LAYOUTS, HYBRID])
def test_early_stopping_and_schedules_decide_alike_on_every_rank(layout: str, num_ranks: int) -> None:
    run = Run(models.Plateau, samples, few_samples, trainer={"max_epochs": 20}, callbacks=_stopping)
    one = one_process(run)
    assert len(one.losses) < 20 * 8
    for record in on_layout(run, layout, num_ranks):
        assert len(record.losses) == len(one.losses)
        assert_equal(one, record)


def _stopping() -> list[Callback]:
    return [EarlyStopping("val/accuracy", mode="max", patience=1)]


def test_one_process_under_the_strategy_equals_lightnings_own() -> None:
    run = Run(models.Grouped, samples, few_samples, trainer={"gradient_clip_val": 0.1})
    assert_equal(one_process(run), train(run, "dp_shard=-1"))


@pytest.mark.parametrize(("layout", "num_ranks"), [*LAYOUTS, HYBRID])
def test_shuffled_epochs_are_those_of_one_process_under_the_strategy(layout: str, num_ranks: int) -> None:
    run = Run(models.Momentum, samples, shuffle=True, trainer={"max_epochs": 2})
    one = once(train, run, "dp_shard=1")
    assert one.losses[:8] != one.losses[8:]
    assert_equal(one, on_layout(run, layout, num_ranks)[-1])


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
def test_seeds_differ_between_runs_not_between_layouts(layout: str, num_ranks: int) -> None:
    first, second = (Run(models.Momentum, samples, seed=seed) for seed in (1, 2))
    assert on_layout(first, layout, num_ranks)[0].losses != on_layout(second, layout, num_ranks)[0].losses


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
def test_unseeded_ranks_start_from_the_weights_of_rank_0(layout: str, num_ranks: int) -> None:
    records = run_on_ranks(num_ranks, _train_unseeded, layout)
    for name, weight in records[0].items():
        torch.testing.assert_close(records[1][name], weight, rtol=0, atol=0)


def _train_unseeded(layout: str) -> dict[str, torch.Tensor]:
    from tests.support.parity import QUIET, HybridStrategy, whole_weights

    torch.manual_seed(torch.distributed.get_rank())
    module = models.Classifier()
    trainer = L.Trainer(**QUIET, devices=2, strategy=HybridStrategy(layout), max_steps=2, callbacks=[LearningRate()])
    trainer.fit(module, torch.utils.data.DataLoader(samples(), batch_size=4))
    return whole_weights(module)


class LearningRate(Callback):
    """Checks that every rank has the same learning rate."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        rate = torch.tensor(trainer.optimizers[0].param_groups[0]["lr"])
        assert trainer.strategy.reduce(rate, reduce_op="max") == trainer.strategy.reduce(rate, reduce_op="min")


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
def test_batchnorm_statistics_are_the_mean_over_the_ranks(layout: str, num_ranks: int) -> None:
    run = Run(models.Normalised, samples, few_samples, trainer={"max_steps": 1})
    one = one_process(run)
    for record in on_layout(run, layout, num_ranks):
        torch.testing.assert_close(record.weights["net.1.running_mean"], one.weights["net.1.running_mean"])
        assert record.weights["net.1.num_batches_tracked"] == 1
        assert record.logged == on_layout(run, layout, num_ranks)[0].logged


def test_parameters_of_several_dtypes_used_by_one_rank_only_equal_one_process_when_replicated() -> None:
    class_by_rank = Run(models.SeveralDtypes, models.sorted_samples, trainer={"gradient_clip_val": 0.1})
    assert_parity(class_by_rank, "dp_replicate=2", 2)


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
def test_a_penalty_on_weights_equals_one_process(layout: str, num_ranks: int) -> None:
    assert_parity(Run(models.Penalised, samples), layout, num_ranks)


SECOND = {
    "penalty": Run(models.GradientPenalty, samples),
    "accumulated": Run(
        models.GradientPenalty, samples, trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    ),
    "recomputed": Run(models.GradientPenalty, samples, strategy={"activation_checkpointing": "full"}),
    "called-again": Run(models.CalledAfterPenalty, samples),
    "alone": Run(models.PenaltyAlone, samples),
    "manual": Run(models.ManualPenalty, samples),
}


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
@pytest.mark.parametrize("case", SECOND)
def test_second_derivatives_equal_one_process(case: str, layout: str, num_ranks: int) -> None:
    assert_parity(SECOND[case], layout, num_ranks)


def test_gradients_with_a_graph_are_refused_when_sharded() -> None:
    with pytest.raises(RankError, match="and call the loss backward once"):
        on_layout(Run(models.BackwardWithGraph, samples), "dp_shard=2", 2)


def test_blocks_that_only_some_ranks_run_are_refused_under_dp_shard() -> None:
    run = Run(models.RoutedBlocks, models.sorted_samples)
    assert_parity(run, "dp_replicate=2", 2)
    with pytest.raises(RankError, match="every rank has to run the same blocks in a step"):
        on_layout(run, "dp_shard=2", 2)
