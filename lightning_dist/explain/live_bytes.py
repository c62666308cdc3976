"""Bytes of the tensors that are alive, operator by operator: of a run, or of one under fakes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_dist.compat.fakes import COMMUNICATE
from lightning_dist.compat.operators import address_of, name_of_operator
from lightning_dist.compat.torch import FakeTensor, FakeTensorMode, TorchDispatchMode, memory_of, tree_leaves
from lightning_dist.dtensors import local_part

PARTS = ("parameters", "gradients", "optimizer states", "communication", "activations", "other")
"""What memory is held for. Communication: gathered parameters and what is sent and received. Activations: all else that
a step makes, also in its backward; other: what was there before, buffers and the batch."""


@dataclass(eq=False)
class Memory:
    """A storage: pairs of an operator's number and the bytes since then, and what it is held for."""

    sizes: list[tuple[int, int]]
    part: str

    def bytes_at(self, number: int) -> int:
        """Bytes after the operator of that number."""
        return next((size for since, size in reversed(self.sizes) if since <= number), 0)


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make while it lasts, each from then on until it is freed.

    What was made before counts once an operator returns it. What a kernel allocates for itself is not seen, nor what
    an allocator rounds up to.

    Args:
        fakes: whose tensors count beside real ones; those of other modes stand for what is elsewhere.
    """

    def __init__(self, fakes: FakeTensorMode | None = None) -> None:
        super().__init__()
        self.part = "other"
        """What the memory is held for that is made now, unless more is known of it."""
        self.now = self.peak = 0
        self._fakes = fakes
        self._number = self._peak_at = 0
        self._alive: dict[int, Memory] = {}
        self._all: list[Memory] = []
        self._watched: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the operators on its parts are what counts
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # which is asked more often than anything is computed
        output = func(*args, **(kwargs or {}))
        self._number += 1
        communicates = name_of_operator(func).partition("::")[0] in COMMUNICATE
        for tensor in _tensors(output):
            self._count(tensor)
        if communicates:
            self.label("communication", _tensors((args, kwargs)))
            self.label("communication", _tensors(output))
        return output

    def _count(self, tensor: Tensor) -> Memory | None:
        if tensor.is_meta or (isinstance(tensor, FakeTensor) and tensor.fake_mode is not self._fakes):
            return None
        key = memory_of(tensor)
        if key not in self._alive:
            storage = tensor.untyped_storage()
            self._alive[key] = memory = Memory([], self.part)
            self._all.append(memory)
            self._watched[key] = weakref.ref(storage, partial(self._end, key))
            self._resize(memory, storage.nbytes())
        elif (size := tensor.untyped_storage().nbytes()) != self._alive[key].sizes[-1][1]:
            self._resize(self._alive[key], size)
        return self._alive[key]

    def _resize(self, memory: Memory, size: int) -> None:
        self.now += size - (memory.sizes[-1][1] if memory.sizes else 0)
        memory.sizes.append((self._number, size))
        if self.now > self.peak:
            self.peak, self._peak_at = self.now, self._number

    def _end(self, key: int, _: Any) -> None:
        del self._watched[key]
        self._number += 1
        self._resize(self._alive.pop(key), 0)

    def label(self, part: str, tensors: Iterable[Any]) -> None:
        """Says what the memory of tensors is held for; what a run keeps is not said to be communication."""
        for tensor in tensors:
            memory = self._count(local_part(tensor)) if isinstance(tensor, Tensor) else None
            if memory is not None and (part != "communication" or memory.part in ("activations", "other")):
                memory.part = part

    def forget_peak(self) -> None:
        """The peak is that from now on."""
        self.peak, self._peak_at = self.now, self._number

    @property
    def parts(self) -> dict[str, int]:
        """Bytes at the peak, by what they were held for."""
        found = dict.fromkeys(PARTS, 0)
        for memory in self._all:
            found[memory.part] += memory.bytes_at(self._peak_at)
        return found

    def __enter__(self) -> Any:
        self._own_resize: Any = torch.UntypedStorage.resize_

        def resize_(storage: Any, size: int) -> Any:
            result = self._own_resize(storage, size)
            memory = self._alive.get(address_of(storage))
            if memory is not None:
                self._number += 1
                self._resize(memory, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        torch.UntypedStorage.resize_ = self._own_resize  # type: ignore[method-assign]
        super().__exit__(*args)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
