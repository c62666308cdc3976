"""What users gather: differentiably, of different lengths, and by collectives of their own over the world.

[Note: who calls]
The ranks of ``tp`` and ``pp`` see the same samples, so what a step gathers from the world holds each of them several
times. All functions of torch.distributed, however they were imported, ask one private function about their group; while
a Trainer runs, that one also looks at who called. What torch, Lightning, torchmetrics and this package call is theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType, MethodType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.apply_func import convert_to_tensors, move_data_to_device
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed import distributed_c10d

from lightning_dist.collectives import gather_objects
from lightning_dist.compat.distributed import RANK_NOT_IN_GROUP
from lightning_dist.compat.distributed import functional_collectives as functional
from lightning_dist.compat.lightning import running_hook
from lightning_dist.layout import Layout
from lightning_dist.patches import Patches
from lightning_dist.pytree import tree_flatten, tree_map, tree_structure


def all_gather(tensor: Tensor, group: dist.ProcessGroup, sync_grads: bool) -> Tensor:
    """The tensors of a group's ranks, in their order.

    torch's own differentiable gather sends its gradients to ranks of the world instead of the group's on the CPU
    (``torch.distributed.nn.functional``, seen in torch 2.14).

    Args:
        tensor: with the same shape on every rank; the result has (ranks, *shape).
        group: to gather from. Forward one all-gather over it, backward one reduce-scatter.
        sync_grads: differentiable, to any order; the gradient is the sum of those of all ranks.
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

    Calls raise a ValueError on every rank if what the ranks hold can't be joined. Communication: while training none
    beside Lightning's; else one all-gather of shapes as objects over the group, and where they differ of the values.
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
        return _own_method, (self._module,)


def _own_method(module: pl.LightningModule) -> Callable[..., Any]:
    return MethodType(type(module).all_gather, module)


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


_GATHERING = ("all_gather", "all_gather_single", "all_gather_coalesced", "all_gather_object", "gather", "gather_single")
_SCATTERING = ("reduce_scatter", "reduce_scatter_single", "all_to_all", "all_to_all_single")
GATHERS = frozenset([*_GATHERING, "gather_object", *_SCATTERING])
"""Functions whose result has a piece for each rank."""
SUMS, PLACES = frozenset(["all_reduce", "all_reduce_coalesced", "reduce"]), frozenset(["get_rank", "get_world_size"])

_BETWEEN = (
    *("torch.distributed.distributed_c10d", "torch.distributed.c10d_logger", "torch.distributed.nn.functional"),
    *("torch.autograd.function", "typing_extensions", "functools", "contextlib"),
)
"""Modules that lie between a caller and the question about the group (seen in torch 2.14)."""

_OTHERS = {"torch", "torchmetrics", "lightning", "lightning_fabric", "pytorch_lightning", __name__.partition(".")[0]}


class WorldCalls:
    """Looks at collectives over the world while it is attached; see [Note: who calls]. Communication: none."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._in_step = self._gathered = False
        self._read: set[str] = set()
        self._told: set[str] = set()

    def attach(self, patches: Patches) -> None:
        """Begins, for this process, until an undo."""
        patches.wrap(distributed_c10d, RANK_NOT_IN_GROUP, self._ask)

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """While a step runs, gathers are refused, not told of."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def note_gather(self) -> None:
        """Called when a step gathers from the ranks with different samples: its own place there may be asked next."""
        self._gathered = self._gathered or self._in_step
        self._tell_of_places()

    def note_place(self, name: str) -> None:
        """Called when somebody reads the strategy's ``global_rank`` or ``world_size``."""
        caller: FrameType | None = sys._getframe(2)
        while caller is not None and caller.f_code.co_name == name:  # of the module, of the trainer
            caller = caller.f_back
        if _is_users(caller) and (self._in_step or name == "world_size"):
            self._read.add(name)
            self._tell_of_places()

    def _tell_of_places(self) -> None:
        """A rank compared with 0 is nobody's place: it matters where something is gathered."""
        for name in sorted(self._read - self._told):
            if name == "world_size" or self._gathered:
                self._told.add(name)
                rank_zero_warn(f"{name} {self._why()} {_WEIGHED[1]}")

    def _ask(self, original: Callable[[Any], bool], group: Any) -> bool:
        if group is None or group is dist.group.WORLD:
            self._look(sys._getframe(1))
        return original(group)

    def _look(self, asked: FrameType) -> None:
        name = asked.f_code.co_name
        adds_up = name in SUMS and asked.f_locals.get("op") in (dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT)
        if not (adds_up or name in GATHERS or name in PLACES):
            return
        caller: FrameType | None = asked
        while caller is not None and _module(caller) in _BETWEEN:
            if name in PLACES and _module(caller).endswith("nn.functional"):
                return
            caller = caller.f_back
        if not _is_users(caller):
            return
        if name in self._told and not (name in GATHERS and self._in_step):
            return
        instead = _INSTEAD if name in GATHERS else _WEIGHED[name in PLACES]
        message = f"torch.distributed.{name} over all ranks {self._why()} {instead}"
        if name in GATHERS and self._in_step:
            raise ValueError(message)
        self._told.add(name)
        rank_zero_warn(message)

    def _why(self) -> str:
        axes = [f"{axis}={degree}" for axis, degree in self._layout.items() if axis in _COPYING and degree > 1]
        copies = self._layout.world_size // self._layout.num_data_ranks
        return (
            f"under layout {self._layout}: the ranks of {' and '.join(axes)} see the same samples, so each sample is "
            f"there {copies} times."
        )


_COPYING = ("tp", "pp", "cp")
_INSTEAD = (
    "Use self.all_gather, which gathers every sample once, or pass group=trainer.strategy.data_group, whose size and "
    "own place are trainer.strategy.num_data_ranks and data_rank"
)
_WEIGHED = (
    "A mean over the ranks is right, a sum counts each sample as often: use trainer.strategy.reduce, or pass "
    "group=trainer.strategy.data_group",
    "To count or find samples, take trainer.strategy.num_data_ranks and data_rank",
)


def _is_users(caller: FrameType | None) -> bool:
    return caller is not None and _module(caller).partition(".")[0] not in _OTHERS


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
