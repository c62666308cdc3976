"""The random generators that a training draws from: their states, how they are seeded, and a rank's own streams."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

CPU = torch.device("cpu")


@dataclass(frozen=True)
class RandomStates:
    """States of the generators at one moment: torch's on the CPU, Python's, numpy's, and an accelerator's."""

    cpu: Tensor
    python: tuple[Any, ...]
    numpy: Any
    device: Tensor | None = None

    @classmethod
    def now(cls, device: torch.device) -> RandomStates:
        """The states at this moment."""
        on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(torch.get_rng_state(), random.getstate(), np.random.get_state(), on_device)

    def restore(self, device: torch.device) -> None:
        """Puts the generators back; that of the device where its state was taken on a device of that kind."""
        torch.set_rng_state(self.cpu)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        if self.device is not None and device.type != "cpu":
            torch.get_device_module(device).set_rng_state(self.device, device)

    def to_state(self) -> dict[str, Any]:
        """In tensors, numbers and strings, which a checkpoint may hold; see :meth:`from_state`."""
        name, keys, *numbers = self.numpy
        numpy = [name, torch.from_numpy(keys.astype(np.int64)), *numbers]
        return {"cpu": self.cpu, "python": self.python, "numpy": numpy, "device": self.device}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> RandomStates:
        """What :meth:`to_state` made."""
        name, keys, *numbers = state["numpy"]
        version, internal, gauss = state["python"]
        numpy = (name, keys.numpy().astype(np.uint32), *numbers)
        return cls(state["cpu"], (version, tuple(internal), gauss), numpy, state["device"])


@contextmanager
def kept_random_states(device: torch.device) -> Iterator[None]:
    """Leaves the generators as they were."""
    states = RandomStates.now(device)
    try:
        yield
    finally:
        states.restore(device)


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that random operations on ``device`` draw from when none is given."""
    if device.type == "cpu":
        return torch.default_generator
    backend: Any = torch.get_device_module(device)
    index = backend.current_device() if device.index is None else device.index
    return backend.default_generators[index]


def _seed_torch(seed: int, device: torch.device) -> None:
    """Seeds torch's generators, the CPU's and a device's.

    ``torch.manual_seed`` seeds every kind of accelerator that torch knows. For one that this process has not started it
    formats a traceback each time and keeps it: 6 ms for three of them, 50 calls deep (seen in 2.14).
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        default_generator(device).manual_seed(seed)


def seed_generators(seed: int, device: torch.device = CPU) -> None:
    """Seeds torch, Python and numpy."""
    _seed_torch(seed, device)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def seed_microbatch(device: torch.device, seed: int, index: int, stage: int | None = None) -> None:
    """Seeds torch, Python and numpy: up to a stage's entry the same on all stages, then the stage's own."""
    seed_generators((seed * 1_000_003 + index * 1_009 + (0 if not stage else stage * 7_919 + 1)) % 2**31, device)


def share_random_state(device: torch.device) -> None:
    """Every rank goes on with rank 0's generators: what is built or drawn from here on is alike.

    Communication: broadcasts over the world, of 5 kB for torch's, 16 bytes for a GPU's, and objects for the others'.
    """
    for generator in _generators(device.type):
        state = generator.get_rng_state().to(device)
        dist.broadcast(state, 0)
        generator.set_rng_state(state.cpu())
    others: list[Any] = [random.getstate(), np.random.get_state()]
    dist.broadcast_object_list(others, 0, device=device)
    random.setstate(others[0])
    np.random.set_state(others[1])


def part_random_streams(data_rank: int) -> None:
    """Data ranks draw apart from here on, in dropout and augmentation; data rank 0 goes on as one process would."""
    state = torch.get_rng_state()
    seed = int(torch.randint(2**31, ()))
    torch.set_rng_state(state)
    if data_rank:
        torch.manual_seed(seed + data_rank)
        np.random.seed((seed + data_rank) % 2**32)
        random.seed(seed + data_rank)


class OwnStream:
    """A stream of random numbers of this rank's own, between :meth:`begin` and :meth:`end`. Communication: none.

    The ranks of a tensor axis share their stream: random numbers are alike where tensors are replicated. Where they are
    split each rank takes a stream of its own, seeded from the shared one, so that dropout on this rank's heads or
    columns differs from the others'; the shared stream goes on by one draw.

    Args:
        mesh: of the tensor axis.
        moves: the shared stream goes on also where nothing was drawn in this one.
    """

    open: ClassVar[list[OwnStream]] = []
    """Those that have begun and not ended, outermost first."""

    is_seeding: ClassVar[bool] = False
    """A seed is drawn just now, which no module asked for."""

    def __init__(self, mesh: DeviceMesh, moves: bool = True) -> None:
        self._mesh, self.moves = mesh, moves
        self._left: list[_Left] = []
        """The generators, until the shared stream goes on."""

    def begin(self) -> None:
        """Leaves the shared stream; nothing happens where it is left already."""
        if self._left:
            return
        generators = _generators(self._mesh.device_type)
        before = [generator.get_rng_state() for generator in generators]
        OwnStream.is_seeding = True
        seed = int(torch.randint(2**31, (), device="cpu"))
        OwnStream.is_seeding = False
        after = [generator.get_rng_state() for generator in generators]
        _seed_torch(seed + self._mesh.get_local_rank(), torch.device(self._mesh.device_type))
        own = [generator.get_rng_state() for generator in generators]
        self._left = [*map(_Left, generators, before, after, own)]
        OwnStream.open.append(self)

    @property
    def episode(self) -> object:
        """Another object each time that the stream begins; None where it has not."""
        return self._left or None

    def end(self) -> None:
        """Goes on with the shared stream, where it was left."""
        left, self._left = self._left, []
        moves = self.moves or any(not torch.equal(one.generator.get_rng_state(), one.own) for one in left)
        for one in left:
            one.generator.set_rng_state(one.after if moves else one.before)
        if left:
            OwnStream.open.remove(self)

    def forget(self) -> None:
        """Stays with the generators as they are: somebody else has put them back."""
        if self._left:
            OwnStream.open.remove(self)
        self._left = []


@dataclass(frozen=True)
class _Left:
    """A generator that left the shared stream, its states before and after the draw of a seed, and with that seed."""

    generator: Any
    before: Tensor
    after: Tensor
    own: Tensor


_running: list[OwnStream] = []
"""The streams that :func:`own_stream` began, outermost first."""


def _generators(device_type: str) -> list[Any]:
    return [torch] if device_type == "cpu" else [torch, torch.get_device_module(device_type)]


@contextmanager
def own_stream(mesh: DeviceMesh, moves: bool = True, begins: bool = True) -> Iterator[OwnStream]:
    """Inside, and until :func:`shared_again`, a stream of this rank's own, see :class:`OwnStream`; or from where what
    is given begins it.
    """
    _running.append(OwnStream(mesh, moves))
    try:
        if begins:
            _running[-1].begin()
        yield _running[-1]
    finally:
        _running.pop().end()


def shared_again() -> None:
    """Goes on with the shared stream before the end of :func:`own_stream`: what follows is replicated again."""
    if _running:
        _running[-1].end()
