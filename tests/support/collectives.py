"""Counters of collectives: the benchmark's, around the calls of a strategy's method."""

from __future__ import annotations

from typing import Any

from lightning_dist import HybridStrategy
from recipes.benchmark.collectives import Collectives, StepCollectives

__all__ = ["Collectives", "StepCollectives", "counting"]


def counting(method: str, counts: list[dict[str, int]]) -> type[HybridStrategy]:
    """HybridStrategy that notes in ``counts``, by kind, the collectives of each call of ``method``."""

    def counted(self: HybridStrategy, *args: Any, **kwargs: Any) -> Any:
        with Collectives() as seen:
            output = getattr(HybridStrategy, method)(self, *args, **kwargs)
        counts.append(dict(seen.count))
        return output

    return type("Counting", (HybridStrategy,), {method: counted})
