"""What happens to random generators while a model is recorded, so that the replay draws what plain building draws."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

_MARK = 0x11D1_5700_0000_0000
"""Where the seeds of the marks start: far from what a person types."""


@dataclass
class RandomStream:
    """One generator: where it started, and what Python code did to its state between recorded draws.

    [Note: marks]
    While recording, nothing is drawn: the state of a generator would stand still, and two copies that Python
    code took of it (``torch.get_rng_state``, ``torch.random.fork_rng``) at different places would look the same.
    So each recorded draw puts the generator into a state of its own, a mark. A state that is found later is then
    either the last mark (nothing happened), an earlier one (Python code put back what it had saved after that
    draw), or none of them (Python code seeded the generator).
    """

    generator: torch.Generator
    start: Tensor
    marks: dict[bytes, int] = field(default_factory=dict)
    num_draws: int = 0
    saved_after: set[int] = field(default_factory=set)
    at_end: int | Tensor | None = None

    @classmethod
    def of(cls, generator: torch.Generator) -> RandomStream:
        """The stream of a generator, from its state of now."""
        stream = cls(generator, generator.get_state())
        stream.marks[_digest(stream.start)] = 0
        stream._last = _digest(stream.start)
        return stream

    _last: bytes = b""

    def find_jump(self) -> int | Tensor | None:
        """What Python code did since the last draw: ``None`` for nothing, the number of the draw after which the
        state that it put back had been saved, or the state that it set."""
        state = self.generator.get_state()
        digest = _digest(state)
        if digest == self._last:
            return None
        self._last = digest
        if digest in self.marks:
            self.saved_after.add(self.marks[digest])
            return self.marks[digest]
        return state

    def mark(self) -> int:
        """Counts a draw, see [Note: marks]; returns its number."""
        self.num_draws += 1
        self.generator.manual_seed(_MARK + self.num_draws)
        self._last = _digest(self.generator.get_state())
        self.marks[self._last] = self.num_draws
        return self.num_draws

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


def host_random_state() -> tuple[Any, Any]:
    """States of the generators of Python and NumPy, which run for real while a model is recorded."""
    import numpy

    return random.getstate(), numpy.random.get_state()


def restore_host_random_state(state: tuple[Any, Any]) -> None:
    """Puts back what :func:`host_random_state` returned."""
    import numpy

    random.setstate(state[0])
    numpy.random.set_state(state[1])


def _digest(state: Tensor) -> bytes:
    return sha256(state.numpy().tobytes()).digest()
