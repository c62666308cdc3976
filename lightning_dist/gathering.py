"""Gathers what the ranks with different samples hold: differentiably, and of different lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.apply_func import convert_to_tensors, move_data_to_device
from torch import Tensor

from lightning_dist.collectives import gather_objects
from lightning_dist.compat.distributed import functional_collectives as functional
from lightning_dist.compat.lightning import running_hook
from lightning_dist.pytree import tree_flatten, tree_map, tree_structure


def all_gather(tensor: Tensor, group: dist.ProcessGroup, sync_grads: bool) -> Tensor:
    """The tensors of a group's ranks, in their order.

    torch's own differentiable gather sends its gradients to ranks of the world instead of the group's on the CPU
    (``torch.distributed.nn.functional``, seen in torch 2.14).

    Args:
        tensor: with the same shape on every rank; the result has (ranks, *shape).
        group: to gather from.
        sync_grads: differentiable, to any order; the gradient is the sum of those of all ranks.

    Communication: forward one all-gather over the group, backward one reduce-scatter.
    """
    if sync_grads:
        return _Gathered.apply(tensor, group)
    with torch.no_grad():
        return _gathered(tensor, group)


def validate_even(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Raises a ValueError on every rank of the group if they bring different shapes, which would end the processes.

    Communication: one all-gather of shapes, as objects.
    """
    shapes = gather_objects(tuple(tensor.shape), group)
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"all_gather after the run was given tensors of shapes {', '.join(map(str, shapes))} on the data ranks: "
            "gather in on_predict_epoch_end or the like, where ranks may have different numbers of rows, or pad them"
        )


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    return functional.wait_tensor(functional.all_gather_tensor(tensor.unsqueeze(0).contiguous(), 0, group))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Summed.apply(gradient, ctx.group), None


class _Summed(torch.autograd.Function):
    """This rank's of a tensor for each rank, summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensors: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        summed = functional.reduce_scatter_tensor(tensors.contiguous(), "sum", 0, group)
        return functional.wait_tensor(summed).squeeze(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Gathered.apply(gradient, ctx.group), None


_EVEN_HOOKS = ("on_train_epoch_end", "on_train_end")
"""While training, only here may ranks hold different numbers of rows: batches have as many."""


class UnevenAllGather:
    """Wraps a module's ``all_gather``; what is equally long everywhere goes on to Lightning's own.

    Evaluation shards whole batches, so a rank may have fewer rows than another, or none. Lightning's ``all_gather``
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
        own = partial(type(self._module).all_gather, self._module, group=group, sync_grads=sync_grads)
        is_even = self._module.trainer.training and running_hook(self._module) not in _EVEN_HOOKS
        if group not in (None, dist.group.WORLD) or is_even:
            return own(data)
        data = convert_to_tensors(data, device=self._module.device)
        everyone = gather_objects((_form(data), self._counts()), self._group)
        forms = [form for form, _ in everyone]
        counting = [rank for rank, (_, counts) in enumerate(everyone) if counts]
        if len(counting) == len(everyone) and all(form == forms[0] for form in forms):
            return own(data)
        everyone = gather_objects(move_data_to_device(data, torch.device("cpu")), self._group)
        joined = _join([everyone[rank] for rank in counting])
        return move_data_to_device(joined, self._module.device)

    def __reduce__(self) -> Any:
        # a copy of the module has no process group; it gathers as Lightning does
        return MethodType, (type(self._module).all_gather, self._module)


def _form(data: Any) -> Any:
    leaves, structure = tree_flatten(data)
    forms = [(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]
    return str(structure), forms


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
