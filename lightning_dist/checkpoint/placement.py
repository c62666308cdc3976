"""Copies of a state in host memory, and what a rank holds of a tensor as torch's distributed checkpoints ask it."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_dist.dtensors import held_runs, local_part
from lightning_dist.pytree import map_leaves


class HostMemory:
    """Host memory for copies of a state, kept from one to the next: to get it from the system takes several times as
    long as to copy into it.

    Where tensors come from an accelerator it is page-locked, and the copies run together.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype, bool], list[Tensor]] = {}
        self._lent: list[tuple[tuple[torch.Size, torch.dtype, bool], Tensor]] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy, complete after :meth:`settle` and whole until :meth:`reuse`."""
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

    def snapshot(self, tree: Any) -> Any:
        """A deep copy, its tensors in host memory: nothing that the training or its callbacks change is shared."""
        copies: dict[int, Any] = {}

        def note(_: Any, value: Any) -> Any:
            if isinstance(value, Tensor) and id(value) not in copies:
                copies[id(value)] = self.copy(value)
            return value

        map_leaves(tree, note)
        return copy.deepcopy(tree, copies)

    def settle(self) -> None:
        """Waits for the copies from an accelerator."""
        if any(locked for (_, _, locked), _ in self._lent):
            torch.accelerator.synchronize()

    def reuse(self) -> None:
        """Takes back all that was lent, to be overwritten; what was not lent this time is let go."""
        self._free = {}
        for kind, memory in self._lent:
            self._free.setdefault(kind, []).append(memory)
        self._lent = []


def boxes(tensor: DTensor, copy: Tensor | None = None) -> Tensor:
    """What this rank holds, or a copy of it, told where in the plain tensor its boxes lie: DCP's
    ``CheckpointableTensor`` protocol.
    """
    local = local_part(tensor) if copy is None else copy
    told: Any = local.view_as(local)  # an object of its own, which takes the attributes
    runs = list(itertools.product(*(held_runs(tensor))))
    told.global_shape = tuple(tensor.shape)
    told.local_offsets = [tuple(start for start, _, _ in box) for box in runs]
    told.global_offsets = [tuple(start for _, start, _ in box) for box in runs]
    told.local_sizes = [tuple(length for *_, length in box) for box in runs]
    return told
