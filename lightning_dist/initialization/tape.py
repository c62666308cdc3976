"""The tape: the operations that gave deferred tensors their values, in the order in which the model ran them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_dist.compat.operators import address_of
from lightning_dist.initialization.recorded_draws import RandomStream


class CannotDefer(RuntimeError):
    """A model can't be built on the meta device and filled in later; building it plainly still works."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the initialisation of this model can't be deferred: {reason}. Build the model in __init__, where it "
            "is constructed plainly, or make this computation independent of the values of parameters"
        )


@dataclass(frozen=True, slots=True)
class Slot:
    """A view of a deferred storage, which stands for a tensor on the tape.

    A tensor object is no lasting name: ``Parameter(w)``, ``w.data`` and ``w.detach()`` are other objects over the
    same values, and ``w.data = x`` is the same object over others.
    """

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size of the elements that the view selects, in bytes."""
        count = 1
        for length in self.size:
            count *= length
        return count * self.dtype.itemsize

    def view(self, storage: torch.UntypedStorage) -> Tensor:
        """The tensor that the slot stands for, over the values of ``storage``."""
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        return tensor.set_(storage, self.offset, self.size, self.stride)

    def scratch(self, device: torch.device) -> Tensor:
        """A tensor of the same geometry (which decides the order of random draws) over other memory."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=device)


@dataclass(frozen=True, slots=True)
class Constant:
    """A real tensor that a recorded operation reads, as it was then."""

    value: Tensor


@dataclass(slots=True)
class DeferredStorage:
    """Memory that is not there yet.

    Args:
        meta: the storage on the meta device; kept, so that its address names no other.
        device: where plain building would have put it.
        is_known: false for memory that something outside the recording made, whose values nobody knows.
    """

    meta: torch.UntypedStorage
    device: torch.device
    is_known: bool


@dataclass(frozen=True, slots=True)
class Draw:
    """The random numbers of a step: from which generator, the how-manieth draw, and a jump of its state before."""

    stream: RandomStream
    number: int
    jump: int | Tensor | None


@dataclass(frozen=True, slots=True)
class Step:
    """One operation.

    Args:
        function, args, kwargs: the call, with a :class:`Slot` for each deferred tensor.
        outputs: slots of those results that are new storages, by their place among the flattened results.
        reads: storages whose values it needs; a write to a part of a storage needs the rest of it.
        writes: storages that it changes or makes.
        fills: those of them whose values it replaces entirely, whatever they were.
        ignores_values: it replaces all that it writes to, so that it can run on scratch memory.
        draw: random numbers that it takes.
        default_dtype: what ``torch.get_default_dtype()`` was.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: dict[int, Slot]
    reads: frozenset[int]
    writes: frozenset[int]
    fills: frozenset[int]
    ignores_values: bool
    draw: Draw | None
    default_dtype: torch.dtype


@dataclass
class Tape:
    """Steps, the storages they name by number, and the generators they drew from."""

    steps: list[Step] = field(default_factory=list)
    storages: list[DeferredStorage] = field(default_factory=list)
    streams: list[RandomStream] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)

    def slot(self, tensor: Tensor) -> Slot:
        """The slot of a meta tensor; a storage that is new here counts as unknown."""
        if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
            raise CannotDefer(f"it has a deferred tensor of layout {tensor.layout}, conjugated or negated lazily")
        number = self.find(tensor)
        if number is None:
            number = self.add(tensor, torch.device("meta"), is_known=False)
        return Slot(number, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))

    def find(self, tensor: Tensor) -> int | None:
        """The number of the storage of a meta tensor."""
        return self._numbers.get(address_of(tensor.untyped_storage()))

    def add(self, tensor: Tensor, device: torch.device, is_known: bool = True) -> int:
        """Gives the storage of a meta tensor a number."""
        meta = tensor.untyped_storage()
        self.storages.append(DeferredStorage(meta, device, is_known))
        self._numbers[address_of(meta)] = len(self.storages) - 1
        return len(self.storages) - 1

    def covers(self, slot: Slot) -> bool:
        """Whether the slot selects each byte of its storage."""
        return slot.num_bytes == self.storages[slot.storage].meta.nbytes() and slot.offset == 0

    def stream(self, generator: torch.Generator) -> RandomStream:
        """The stream of a generator; it begins when the generator is first seen."""
        for stream in self.streams:
            if stream.generator is generator:
                return stream
        self.streams.append(RandomStream.of(generator))
        return self.streams[-1]
