"""The tensor axis under the Trainer: both recipes give the numbers of one process, alone and with the data axes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.parity import Run, assert_parity
from tests.recipes.test_parity import RUNS

LAYOUTS = [("tp=2", 2), ("dp_shard=2,tp=2", 4), ("dp_replicate=2,tp=2", 4)]


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
@pytest.mark.parametrize("recipe", RUNS)
def test_twenty_steps_equal_one_process(recipe: str, layout: str, num_ranks: int) -> None:
    assert_parity(RUNS[recipe], layout, num_ranks)


def test_four_ranks_divide_four_heads() -> None:
    assert_parity(RUNS["image_classification"], "tp=4", 4)


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
def test_accumulation_equals_one_process(layout: str, num_ranks: int) -> None:
    run = RUNS["language_model"]
    accumulating: Run = replace(run, trainer={**run.trainer, "accumulate_grad_batches": 3})
    assert_parity(accumulating, layout, num_ranks)
