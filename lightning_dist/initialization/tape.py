"""The tape: the operations that gave deferred tensors their values, in the order in which the model ran them, and the
random generators meanwhile, so that the replay draws what plain building draws.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from lightning_dist.compat.operators import address_of

_MARK = 0x11D1_5700_0000_0000
"""Where the seeds of the marks start: far from what a person types."""


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
        meta, number = tensor.untyped_storage(), len(self.storages)
        self.storages.append(DeferredStorage(meta, device, is_known))
        self._numbers[address_of(meta)] = number
        return number

    def covers(self, slot: Slot) -> bool:
        """Whether the slot selects each byte of its storage."""
        num_bytes = math.prod(slot.size) * slot.dtype.itemsize
        return num_bytes == self.storages[slot.storage].meta.nbytes() and slot.offset == 0

    def stream(self, generator: torch.Generator) -> RandomStream:
        """The stream of a generator; it begins when the generator is first seen."""
        for stream in self.streams:
            if stream.generator is generator:
                return stream
        self.streams.append(RandomStream(generator))
        return self.streams[-1]


class RandomStream:
    """One generator: where it started, and what Python code did to its state between recorded draws.

    [Note: marks]
    While recording, nothing is drawn: the state of a generator would stand still, and two copies that Python
    code took of it (``torch.get_rng_state``, ``torch.random.fork_rng``) at different places would look the same.
    So each recorded draw puts the generator into a state of its own, a mark. A state that is found later is then
    either the last mark (nothing happened), an earlier one (Python code put back what it had saved after that
    draw), or none of them (Python code seeded the generator).
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.start = generator, generator.get_state()
        self.saved_after: set[int] = set()
        self.at_end: int | Tensor | None = None
        self._last, self._num_draws = _digest(self.start), 0
        self._marks = {self._last: 0}

    def find_jump(self) -> int | Tensor | None:
        """What Python code did since the last draw: ``None`` for nothing, the number of the draw after which the
        state that it put back had been saved, or the state that it set."""
        state = self.generator.get_state()
        digest = _digest(state)
        if digest == self._last:
            return None
        self._last = digest
        if digest in self._marks:
            self.saved_after.add(self._marks[digest])
            return self._marks[digest]
        return state

    def mark(self) -> int:
        """Counts a draw, see [Note: marks]; returns its number."""
        self._num_draws += 1
        self.generator.manual_seed(_MARK + self._num_draws)
        self._last = _digest(self.generator.get_state())
        self._marks[self._last] = self._num_draws
        return self._num_draws

    def finish(self) -> None:
        """Ends the recording: the generator is as it was before."""
        self.at_end = self.find_jump()
        self.generator.set_state(self.start)


class StreamPlayer:
    """The same generator during a replay: it starts where the recording started, and jumps where Python code did."""

    def __init__(self, stream: RandomStream) -> None:
        self.stream = stream
        self._saved: dict[int, Tensor] = {}
        stream.generator.set_state(stream.start)
        self.after_draw(0)

    def jump(self, target: int | Tensor | None) -> None:
        """Repeats what :meth:`RandomStream.find_jump` found."""
        if target is not None:
            state = self._saved[target] if isinstance(target, int) else target
            self.stream.generator.set_state(state)

    def after_draw(self, number: int) -> None:
        """Keeps the state, if a later jump goes back to it."""
        if number in self.stream.saved_after:
            self._saved[number] = self.stream.generator.get_state()

    def finish(self) -> None:
        """Leaves the generator as plain building would have left it."""
        self.jump(self.stream.at_end)


def keep_host_random_state() -> Callable[[], None]:
    """What puts the generators of Python and NumPy back as they are now; recording, they run for real."""
    import numpy

    of_python, of_numpy = random.getstate(), numpy.random.get_state()

    def put_back() -> None:
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)

    return put_back


def _digest(state: Tensor) -> bytes:
    return sha256(state.numpy().tobytes()).digest()
