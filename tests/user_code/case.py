"""A case: one small module as people write it, and what has to come of it under each layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import Callback

from tests.user_code.samples import loader, val_loader

LAYOUTS = {
    "r": "dp_replicate=2",
    "s": "dp_shard=2",
    "t": "tp=2",
    "st": "dp_shard=2,tp=2",
    "rs": "dp_replicate=2,dp_shard=2",
}
"""The layouts of every case, by the short names that the table has."""

PIPELINES = {
    "p": "pp=2",
    "pr": "pp=2,dp_replicate=2",
    "ps": "pp=2,dp_shard=2",
    "pt": "pp=2,tp=2",
    "pg": "pp=2",
    "pi": "pp=2",
}
"""Those of a pipeline, likewise."""

SCHEDULES = {"pg": "GPipe", "pi": "Interleaved1F1B"}
"""Of the pipelines that have another than the default."""

SPLIT = ("s", "t", "st", "rs")
"""Those under which ranks hold parts of parameters."""

BATCH_SIZE = 8
"""Of one process: the samples of a step over all ranks."""


def degrees(layout: str) -> Degrees:
    """Of a layout, by its short name."""
    axes = dict(axis.split("=") for axis in {**LAYOUTS, **PIPELINES}[layout].split(","))
    number = {axis: int(degree) for axis, degree in axes.items()}
    data = number.get("dp_replicate", 1) * number.get("dp_shard", 1)
    return Degrees(number.get("pp", 1), data, number.get("tp", 1))


class Degrees(NamedTuple):
    """How many ranks lie along each kind of axis, in the order of the mesh: the last one varies first."""

    pp: int
    data: int
    tp: int


def num_data_ranks(layout: str) -> int:
    """Groups of ranks with different samples."""
    return degrees(layout).data


def num_ranks(layout: str) -> int:
    """Ranks in the whole."""
    return math.prod(degrees(layout))


@dataclass(frozen=True)
class Case:
    """A training to compare with one process.

    What it appends to a list ``seen``, of the module or of a callback, is compared too, on every rank.

    Args:
        name: in the table.
        module: makes the LightningModule.
        train: makes the training loader, of the batch size of a data rank.
        val: the same for validation; None has none.
        trainer: arguments of the Trainer.
        callbacks: makes them.
        strategy: arguments of HybridStrategy beside the layout.
        refused: by layout, a regular expression of the sentence that refuses it; a layout not named is exact.
        like: what the numbers have to be: of one process, or of Lightning's ddp on as many data ranks, where those
            differ by nature; ``note`` says why.
        left_out: a regular expression of names whose values ddp itself does not keep alike on its ranks.
        precision: of the Trainer.
        note: a line for the table.
    """

    name: str
    module: Callable[[], L.LightningModule]
    train: Callable[[int], Any] = loader
    val: Callable[[int], Any] | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Callback]] = list
    strategy: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    like: Literal["one process", "ddp"] = "one process"
    left_out: str = "^$"
    precision: Literal["64-true", "32-true"] = "64-true"
    note: str = ""

    @property
    def tolerance(self) -> float:
        """Relative, of rounding over a few steps."""
        return 1e-9 if self.precision == "64-true" else 1e-5


def evaluated(size: int, **options: Any) -> Any:
    """The validation loader of most cases; its batch size is its own."""
    return val_loader(**options)
