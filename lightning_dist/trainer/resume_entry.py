"""What a checkpoint says of where its data and random generators stood, and how it is put together."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import Tensor

from lightning_dist.random_states import RandomStates

RESUME = "lightning_dist_resume"
"""The entry of a checkpoint that says where the data and the random generators stood."""


class Place(StrEnum):
    """Where a fit that left on its own goes on; Lightning's callbacks save at others, which it knows itself."""

    BATCH = "batch"
    """With the next batch: all that comes after the one before has been done."""
    VALIDATION = "validation"
    """With the validation after the batch before, from its start."""


@dataclass(frozen=True)
class Step:
    """How things stood when the batch after an optimizer step was asked for, or when the run began."""

    random: RandomStates
    batches: int
    """That were done by then, of all epochs."""
    buffers: dict[str, Tensor]
    """Copies; only where gradients of several batches add up."""


def joined(every: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry :data:`RESUME` of what each data rank had, of one or more of its ranks; None of those that are lost."""
    by_rank: dict[int, Any] = {own["data_rank"]: own for own in every}
    position = {name: value for name, value in every[0].items() if name not in ("random", "loaders", "data_rank")}
    in_order = [by_rank.get(rank) for rank in range(position["num_data_ranks"])]
    of_ranks = {name: [own and own[name] for own in in_order] for name in ("random", "loaders")}
    return {**of_ranks, **position}


def copied(tree: Any) -> Any:
    """The same values in new dictionaries and lists."""
    if type(tree) is dict:
        return {key: copied(value) for key, value in tree.items()}
    return [copied(value) for value in tree] if type(tree) is list else tree


def set_back(loops: dict[str, Any], batches: int, reopens_epoch: bool) -> None:
    """Sets Lightning's states of a fit's loops, as a checkpoint has them, to what they were so many batches before.

    Args:
        loops: the states, after a batch that has ended (2.6.6).
        batches: to take back.
        reopens_epoch: the epoch goes on.
    """
    fit = loops["fit_loop"]
    for part in ("total", "current"):
        progress, epochs = fit["epoch_loop.batch_progress"], fit["epoch_progress"][part]
        if batches:
            progress[part] = dict.fromkeys(progress[part], progress[part]["processed"] - batches)
        if reopens_epoch:
            epochs["processed"] = epochs["completed"] = epochs["started"] - 1
        # as on_train_epoch_start sees them, Lightning would take the batches of the epoch before for those of the next
        epochs["ready"] = min(epochs["ready"], epochs["started"])
