"""``self.all_gather`` of what ranks hold of different lengths: rows that a module collects in an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.apply_func import convert_to_tensors, move_data_to_device
from torch import Tensor

from lightning_dist.pytree import tree_flatten, tree_map, tree_structure

_EVEN_HOOKS = ("on_train_epoch_end", "on_train_end")
"""While training, only here may ranks hold different numbers of rows: batches have as many."""


class Gathering:
    """Stands before a module's ``all_gather``; what is equally long everywhere goes on to Lightning's own.

    Evaluation deals whole batches, so a rank may have fewer rows than another, or none. Lightning's ``all_gather``
    wants equal shapes, and ends or waits for good otherwise. Here

    - a batch that a rank only repeats adds nothing: the result has one entry for each rank that had a batch;
    - tensors of different lengths are joined along their first dimension, in order of the ranks, and the result has
      one entry: its shape is ``(1, rows of all ranks, ...)``;
    - lists of different lengths give a list as long as the longest, each item from the ranks that have it.

    Args:
        module: whose method it is.
        group: the ranks that hold different samples.
        counts: whether the batch that runs is this rank's own.

    Communication: while training none beside Lightning's; else one all-gather of shapes as objects over the group, and
    where they differ one of the values as objects.

    Raises:
        ValueError: on every rank, if what the ranks hold can't be joined.
    """

    def __init__(self, module: pl.LightningModule, group: dist.ProcessGroup, counts: Callable[[], bool]) -> None:
        self._module, self._group, self._counts = module, group, counts

    def __call__(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """As Lightning's; see above for what is not equally long."""
        trainer = self._module.trainer
        own = type(self._module).all_gather
        if group not in (None, dist.group.WORLD) or (
            trainer.training and self._module._current_fx_name not in _EVEN_HOOKS
        ):
            return own(self._module, data, group=group, sync_grads=sync_grads)
        data = convert_to_tensors(data, device=self._module.device)
        everyone: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, (_form(data), self._counts()), self._group)
        forms = [form for form, _ in everyone]
        counting = [rank for rank, (_, counts) in enumerate(everyone) if counts]
        if len(counting) == len(everyone) and all(form == forms[0] for form in forms):
            return own(self._module, data, group=group, sync_grads=sync_grads)
        dist.all_gather_object(everyone, move_data_to_device(data, torch.device("cpu")), self._group)
        joined = _join([everyone[rank] for rank in counting])
        return move_data_to_device(joined, self._module.device)

    def __reduce__(self) -> Any:
        # a copy of the module has no process group; it gathers as Lightning does
        return _own_method, (self._module,)


def _own_method(module: pl.LightningModule) -> Callable[..., Any]:
    return type(module).all_gather.__get__(module)


def _form(data: Any) -> Any:
    leaves, structure = tree_flatten(data)
    return str(structure), [
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves
    ]


def _join(parts: list[Any]) -> Any:
    """What some ranks hold, as one."""
    if isinstance(parts[0], list) and all(isinstance(part, list) for part in parts):
        longest = max(len(part) for part in parts)
        return [_join([part[index] for part in parts if index < len(part)]) for index in range(longest)]
    structures = [str(tree_structure(part)) for part in parts]
    if any(structure != structures[0] for structure in structures):
        raise ValueError(
            f"self.all_gather was given data of different structure on the data ranks: {'; '.join(structures)}; "
            "gather lists, dictionaries or tensors with the same keys on every rank"
        )
    return tree_map(lambda *leaves: _join_leaves(leaves), *parts)


def _join_leaves(leaves: Any) -> Any:
    if not isinstance(leaves[0], Tensor):
        return leaves[0]
    shapes = [tuple(leaf.shape) for leaf in leaves]
    if all(shape == shapes[0] for shape in shapes):
        return torch.stack(list(leaves))
    if any(len(shape) != len(shapes[0]) or shape[1:] != shapes[0][1:] or not shape for shape in shapes):
        raise ValueError(
            f"self.all_gather was given tensors of shapes {', '.join(map(str, shapes))} on the data ranks; they may "
            "differ in their first dimension, the rows, only: pad or flatten the others"
        )
    return torch.cat(list(leaves)).unsqueeze(0)
