"""Whether competitors train the same: a few steps in float64 from the same weights on the same batches.

Float32 can't tell: its rounding grows with the steps, to 1e-3 of the loss after some hundreds.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from recipes.benchmark.interleaving import Competitor
from recipes.benchmark.results import Line

CHECK_STEPS = 5
AGREEMENT = 1e-9
"""Largest difference of losses, relative, and of weights, that is rounding of float64."""


@dataclass(frozen=True)
class Trained:
    """What a few steps in float64 gave.

    Args:
        losses: of the steps.
        weights: whole, after the last step, by name.
    """

    losses: list[float]
    weights: Mapping[str, Tensor]


def agreements(trained: Mapping[str, Trained], what: str) -> Iterable[Line]:
    """A line for each competitor but the first, which the others are compared with; it misses where one differs.

    Args:
        trained: by the name of the competitor.
        what: they train.
    """
    first, *others = trained
    for other in others:
        apart = difference(trained[first], trained[other])
        yield Line(
            f"largest difference after {len(trained[first].losses)} steps in float64",
            f"{what}: {first} and {other}",
            f"{apart:.1e}",
            f"{AGREEMENT:g}",
            {"exact": apart / AGREEMENT},
            1.0,
            {"losses": {first: trained[first].losses, other: trained[other].losses}, "difference": apart},
        )


def difference(one: Trained, other: Trained) -> float:
    """The largest of losses, relative, and weights; infinite where something is missing or not finite."""
    if len(one.losses) != len(other.losses) or one.weights.keys() != other.weights.keys() or not one.losses:
        return float("inf")
    losses, others = torch.tensor([one.losses, other.losses], dtype=torch.float64)
    apart = [((losses - others) / losses).abs().max()]
    for name, weight in one.weights.items():
        if weight.shape != other.weights[name].shape:
            return float("inf")
        apart.append((weight.double().cpu() - other.weights[name].double().cpu()).abs().max())
    largest = float(torch.stack(apart).max())
    return largest if largest == largest else float("inf")


def train_alike(
    competitors: Mapping[str, Competitor], what: str, on_trained: Callable[[], None] = lambda: None
) -> Iterator[Line]:
    """Trains each competitor for a few steps in float64; the lines are those of the rank that differs most.

    Args:
        competitors: by name; the others are compared with the first.
        what: they train.
        on_trained: called after each competitor.

    Communication: that of the steps, the weights gathered whole, and one gather of the differences over the world.
    """
    trained = {}
    for name, competitor in competitors.items():
        trained[name] = _trained(competitor, CHECK_STEPS)
        on_trained()
    lines = list(agreements(trained, what))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, lines)
    for of_ranks in zip(*everyone, strict=True):
        yield max(of_ranks, key=lambda line: line.ratios["exact"])


def _trained(competitor: Competitor, steps: int) -> Trained:
    losses: list[float] = []
    with _default_dtype(torch.float64):
        weights = competitor(lambda loss: losses.append(float(loss)), steps)
        return Trained(losses, {name: weight.detach().cpu() for name, weight in weights().items()})


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None]:
    """Networks are built, samples drawn and constants made in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def whole_weights(network: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, gathered where they are divided. Communication: one gather for each of those."""
    return {
        name: weight.full_tensor() if isinstance(weight, DTensor) else weight
        for name, weight in network.named_parameters()
    }
