"""The random generators that a training draws from: torch's, Python's, numpy's and the device's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class RandomStates:
    """States of the generators at one moment.

    Args:
        cpu: of torch, on the CPU.
        python: of the module ``random``.
        numpy: of ``numpy.random``.
        device: of the accelerator; None on the CPU.
    """

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


def seed_torch(seed: int, device: torch.device = CPU) -> None:
    """Seeds torch's generators, the CPU's and a device's.

    ``torch.manual_seed`` seeds every kind of accelerator that torch knows. For one that this process has not started it
    formats a traceback each time and keeps it: 6 ms for three of them, 50 calls deep (seen in 2.14).
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        default_generator(device).manual_seed(seed)


def seed_generators(seed: int, device: torch.device = CPU) -> None:
    """Seeds torch, Python and numpy."""
    seed_torch(seed, device)
    random.seed(seed)
    np.random.seed(seed % 2**32)
