"""Copies of a state in host memory, that a checkpoint is written from while the training goes on."""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from lightning_dist.checkpoint.lazy_tensors import leaves
from lightning_dist.dtensors import local_part
from lightning_dist.pytree import PLAIN


class HostMemory:
    """Host memory for copies of a state, kept from one to the next: to get it from the system takes several times as
    long as to copy into it. For tensors of an accelerator it is page-locked, and the copies run together.

    torch rounds page-locked memory up to powers of two; ``PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:1`` makes it
    take what larger tensors need, and no more.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype, bool], list[Tensor]] = {}
        self._lent: list[tuple[tuple[torch.Size, torch.dtype, bool], Tensor]] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy, complete after :meth:`synchronize` and whole until :meth:`reuse`."""
        tensor = tensor.detach()
        if tensor.layout != torch.strided or tensor.is_quantized:
            return tensor.to("cpu", copy=True)
        locked = tensor.device.type != "cpu" and torch.accelerator.is_available()
        kind = tensor.shape, tensor.dtype, locked
        free = self._free.get(kind)
        memory = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=locked)
        self._lent.append((kind, memory))
        # an alias: what is written on the copy, as an attribute, is not there the next time
        return memory.copy_(tensor, non_blocking=locked).view_as(memory)

    def snapshot(self, tree: Any, of: Any = None) -> Any:
        """A deep copy, its tensors in host memory: nothing that the training or its callbacks change is shared.

        Where the tree was gathered, ``of`` is what it was gathered from: tensors that share no memory with that were
        made for this, and are taken as they are.
        """
        shared = (
            None if of is None else {_place(value) for _, value in leaves(of, skip=PLAIN) if isinstance(value, Tensor)}
        )
        copies: dict[int, Any] = {}
        for _, value in leaves(tree, skip=PLAIN):
            if isinstance(value, Tensor) and id(value) not in copies:
                is_ours = shared is not None and value.device.type == "cpu" and _place(value) not in shared
                copies[id(value)] = value if is_ours else self.copy(value)
        return _deep_copy(tree, copies)

    def synchronize(self) -> None:
        """Waits for the copies from an accelerator."""
        if any(locked for (_, _, locked), _ in self._lent):
            torch.accelerator.synchronize()

    def reuse(self) -> None:
        """Takes back all that was lent, to be overwritten; what was not lent this time is let go."""
        self._free = {}
        for kind, memory in self._lent:
            self._free.setdefault(kind, []).append(memory)
        self._lent = []


def _deep_copy(tree: Any, copies: dict[int, Any]) -> Any:
    """``copy.deepcopy``, which asks each number in Python: a tuple of random numbers is what it is.

    Args:
        tree: is kept by the caller meanwhile.
        copies: of what has been copied, by its id.
    """
    kind = type(tree)
    if kind in PLAIN:
        return tree
    if kind is tuple:
        if PLAIN.issuperset(map(type, tree)):
            return tree
        values = tuple(_deep_copy(value, copies) for value in tree)
        return tree if all(map(operator.is_, values, tree)) else values
    if id(tree) in copies:
        return copies[id(tree)]
    if kind is list:
        items = copies[id(tree)] = []
        items.extend(_deep_copy(value, copies) for value in tree)
        return items
    if kind in (dict, OrderedDict) and PLAIN.issuperset(map(type, tree)):  # keys of other kinds are copied too
        entries = copies[id(tree)] = kind()
        entries.update((key, _deep_copy(value, copies)) for key, value in tree.items())
        if kind is OrderedDict:  # a state dict's has metadata
            vars(entries).update(_deep_copy(vars(tree), copies))
        return entries
    return copy.deepcopy(tree, copies)


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    """Where the memory of a tensor, or of a rank's part, begins."""
    local = local_part(tensor)
    return local.device, local.untyped_storage().data_ptr() if local.layout == torch.strided else 0
