"""Loops of other shapes: what they do in one process, they do under layouts."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.fabric import cases
from tests.fabric.loop import LAYOUTS, TOLERANCE
from tests.support.parity import once, slow
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

DATA = LAYOUTS[:2]


def _assert_weights(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name] - weight).norm() <= tolerance * weight.norm().clamp(min=1e-6), name


ON_ONE_AXIS = [cases.lightning_module, cases.forgotten_sync, cases.optimizer_first, cases.two_optimizers]


@pytest.mark.parametrize(
    ("case", "layouts"),
    [
        (cases.adversaries, LAYOUTS),
        (cases.language_model, LAYOUTS),
        (cases.one_loss_optimizer, DATA),
        *((case, LAYOUTS[:3]) for case in ON_ONE_AXIS),
        *(slow(case, LAYOUTS[3:]) for case in ON_ONE_AXIS),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_equals_one_process(case: Callable[..., Any], layouts: list[tuple[str, int]]) -> None:
    expected = once(case, None)
    for layout, num_ranks in layouts:
        for found in run_on_ranks(num_ranks, case, layout):
            _assert_weights(expected, found, 5 * TOLERANCE)


@pytest.mark.parametrize(("layout", "num_ranks"), [*LAYOUTS[:3], slow(*LAYOUTS[3])])
def test_evaluation_equals_one_process(layout: str, num_ranks: int) -> None:
    losses, weights, accuracy = once(cases.evaluation, None)
    for found_losses, found, found_accuracy in run_on_ranks(num_ranks, cases.evaluation, layout):
        torch.testing.assert_close(found_losses, losses, rtol=TOLERANCE, atol=1e-6)
        assert found_accuracy == pytest.approx(accuracy)
        _assert_weights(weights, found, TOLERANCE)


@pytest.mark.parametrize(("layout", "num_ranks"), [*DATA, ("tp=2", 2)])
def test_orders_are_those_of_one_process(layout: str, num_ranks: int) -> None:
    expected = once(cases.orders, None)
    for found in run_on_ranks(num_ranks, cases.orders, layout):
        assert found == expected


def test_ranks_that_are_seeded_apart_deal_one_order() -> None:
    for orders in run_on_ranks(2, cases.without_generator, "dp_replicate=2"):
        assert orders == [list(range(12))] * 2


@pytest.mark.parametrize(
    ("layout", "num_ranks", "options"),
    [
        ("dp_shard=2", 2, {"activation_checkpointing": "full"}),
        ("dp_shard=2", 2, {"shard_units": ["blocks.1", "head"], "checkpoint_format": "single"}),
        ("tp=2", 2, {"sequence_parallel": True}),
        ("dp_shard=2", 2, {"compile": {"backend": "eager"}}),
        slow("dp_replicate=2,dp_shard=2", 4, {}),
        slow("dp_replicate=2,tp=2", 4, {}),
    ],
)
def test_options(layout: str, num_ranks: int, options: dict[str, Any]) -> None:
    losses, weights = once(cases.with_options, None)
    for found_losses, found in run_on_ranks(num_ranks, partial(cases.with_options, layout, **options)):
        torch.testing.assert_close(found_losses, losses, rtol=TOLERANCE, atol=1e-6)
        _assert_weights(weights, found, TOLERANCE)


def test_compiled_model_equals_one_process() -> None:
    num_graphs, expected = cases.compiled(None)
    assert num_graphs > 0
    for layout in ("dp_replicate=2", "dp_shard=2"):
        for of_rank, found in run_on_ranks(2, cases.compiled, layout):
            assert of_rank > 0
            _assert_weights(expected, found, 5 * TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "waiting", "reducing"),
    [
        ("dp_replicate=2", {}, {"all-reduce": 1}),
        # a root and three blocks, of which the blocks are gathered twice; what was used
        ("dp_shard=2", {"all-gather": 7}, {"all-gather": 7, "reduce-scatter": 4, "all-reduce": 1}),
        # attention and feed-forward of three blocks, forward and backward
        ("tp=2", {"all-reduce": 12}, {"all-reduce": 12}),
    ],
)
def test_a_step_costs_what_its_layout_costs(layout: str, waiting: dict[str, int], reducing: dict[str, int]) -> None:
    for found in run_on_ranks(2, cases.communicated, layout):
        assert found == [waiting, reducing]


@pytest.mark.parametrize(("layout", "alike"), [("dp_replicate=2", False), ("tp=2", True)])
def test_workers_draw_by_data_rank(layout: str, alike: bool) -> None:
    first, second = run_on_ranks(2, cases.augmented, layout)
    assert (first == second) == alike


@pytest.mark.parametrize(("layout", "num_ranks"), [*LAYOUTS[:3], slow(*LAYOUTS[3])])
def test_ranks_begin_alike_and_draw_apart(layout: str, num_ranks: int) -> None:
    found = run_on_ranks(num_ranks, cases.initial_and_later, layout)
    data_ranks = 1 if layout == "tp=2" else 2
    assert len({tuple(first.tolist()) for _, first, _ in found}) == data_ranks
    for weights, _, later in found:
        _assert_weights(found[0][0], weights, 0.0)
        assert torch.equal(later, found[0][2])


@pytest.mark.parametrize(("layout", "num_ranks"), DATA)
def test_buffers_are_equal_in_evaluation(layout: str, num_ranks: int) -> None:
    first, second = run_on_ranks(num_ranks, cases.buffers, layout)
    assert first["seen"] == 4
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("layout", "num_ranks"), [("dp_replicate=2", 2), ("dp_shard=2,tp=2", 4)])
def test_reductions_are_over_different_samples(layout: str, num_ranks: int) -> None:
    for found in run_on_ranks(num_ranks, cases.reductions, layout):
        assert found == (1.0, 0.5, [0.0, 1.0], 1.0, True, False, "rank 1")


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS[:3])
def test_ranks_skip_a_step_together(layout: str, num_ranks: int) -> None:
    skipped, scale, weights = cases.scaled(None)
    assert skipped == [1.0]
    for found_skipped, found_scale, found in run_on_ranks(num_ranks, cases.scaled, layout):
        assert (found_skipped, found_scale) == (skipped, scale)
        _assert_weights(weights, found, 2e-2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS[:3])
def test_precision(layout: str, num_ranks: int, precision: str) -> None:
    expected = once(cases.mixed, None, precision)
    for losses in run_on_ranks(num_ranks, cases.mixed, layout, precision):
        torch.testing.assert_close(losses, expected, rtol=5e-2, atol=0)


@pytest.mark.parametrize(
    ("case", "layout", "told"),
    [
        (cases.by_loss_backward, "dp_replicate=2", "fabric.backward"),
        (cases.by_loss_backward, "dp_shard=2", "fabric.backward"),
        (cases.twice, "dp_shard=2", "set up before"),
        (cases.twice, "dp_replicate=2", "set up before"),
        (cases.different_batches, "tp=2", "different batches"),
        (cases.not_finite, "dp_shard=2", "not finite|inf|nan"),
        (cases.before_setup, "dp_shard=2", "has a state of"),
    ],
)
def test_refuses(case: Callable[..., str], layout: str, told: str) -> None:
    for message in run_on_ranks(2, case, layout):
        assert re.search(told, message), message
