"""Twenty steps of each recipe give the numbers of one process under every layout of the data axes, and a pipeline."""

from __future__ import annotations

import pytest

from tests.recipes.runs import RUNS
from tests.support.parity import assert_parity, slow

pytestmark = pytest.mark.sampled


@pytest.mark.parametrize(
    ("layout", "num_ranks"),
    [("dp_replicate=2", 2), ("dp_shard=2", 2), slow("dp_replicate=2,dp_shard=2", 4), ("pp=2", 2)],
)
@pytest.mark.parametrize("recipe", [slow(recipe) if recipe == "sequence_to_sequence" else recipe for recipe in RUNS])
def test_twenty_steps_equal_one_process(recipe: str, layout: str, num_ranks: int) -> None:
    assert_parity(RUNS[recipe], layout, num_ranks)
