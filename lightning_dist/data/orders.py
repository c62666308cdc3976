"""Orders of samples that are computed by index: none is held, be it of billions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from torch.utils.data import Sampler

_AT_ONCE = 4096
"""Samples that are computed together."""


class ComputedOrder(Sequence[int]):
    """An order of samples, or every n-th of some part of it, of which a slice takes no memory.

    Args:
        samples_at: samples ``(n,)`` int64 at places ``(n,)`` int64 of the order; places count from 0 to ``size - 1``.
        size: samples of the whole order.
        places: those that are in this part; past the end the order begins again.
        announce: is told samples ``(n,)`` int64 of an iteration, in their order, before they are asked for.
    """

    def __init__(
        self,
        samples_at: Callable[[np.ndarray], np.ndarray],
        size: int,
        places: range | None = None,
        announce: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        self.samples_at, self._size, self._announce = samples_at, size, announce
        self._places = range(size) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> ComputedOrder: ...

    def __getitem__(self, index: Any) -> Any:
        places = self._places[index]
        if isinstance(places, range):
            return ComputedOrder(self.samples_at, self._size, places, self._announce)
        return int(self._take(range(places, places + 1))[0])

    def __iter__(self) -> Iterator[int]:
        following = self._next(0)
        for start in range(0, len(self._places), _AT_ONCE):
            samples, following = following, self._next(start + _AT_ONCE)
            yield from samples.tolist()

    def _next(self, start: int) -> np.ndarray:
        samples = self._take(self._places[start : start + _AT_ONCE])
        if self._announce is not None and samples.size:
            self._announce(samples)
        return samples

    def values(self) -> np.ndarray:
        """All samples of this part, ``(n,)`` int64, for a look at them: nothing is announced."""
        return self._take(self._places)

    def _take(self, places: range) -> np.ndarray:
        return self.samples_at(np.arange(places.start, places.stop, places.step, dtype=np.int64) % self._size)

    def of_length(self, count: int) -> ComputedOrder:
        """The first so many places of this part, filled up from the start of the order where there are fewer."""
        start = self._places.start
        return ComputedOrder(self.samples_at, self._size, range(start, start + count), self._announce)


class ComputedSampler(Sampler[int]):
    """A sampler whose order hangs on the epoch alone, and on what it was made with."""

    epoch = 0

    def order(self, epoch: int) -> ComputedOrder:
        """The order of an epoch, counted from 0; the same in every process."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration takes; Lightning tells it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))

    def __len__(self) -> int:
        return len(self.order(self.epoch))
