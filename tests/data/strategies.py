"""The strategy of a layout for the small network of the tests, whose blocks ``tp`` does not know by itself."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_dist import HybridStrategy
from tests.support.models import BLOCK_PLAN

LAYOUTS = [("dp_replicate=2", 2), ("dp_shard=2", 2), ("tp=2", 2), ("dp_replicate=2,dp_shard=2", 4)]


def layouts(*always: str) -> list[Any]:
    """All, of which those that are not named run among the slow tests only."""
    marks = {name: () if name in always else pytest.mark.slow for name, _ in LAYOUTS}
    return [pytest.param(name, ranks, marks=marks[name]) for name, ranks in LAYOUTS]


def strategy_of(layout: str | None, **options: Any) -> Any:
    """For the Trainer; of one process where there is no layout."""
    if layout is None:
        return "auto"
    plan = BLOCK_PLAN if "tp" in layout else None
    return HybridStrategy(layout, tensor_plan=plan, **options)
