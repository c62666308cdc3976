"""Permutations that are computed by index, whole and in windows.

They are integers and shifts alone, so that an order is the same on every machine and with every version of numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RUN = 256
"""Blocks that follow each other in the store, and are read in one window."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6


def mix(*parts: np.ndarray | int) -> np.ndarray:
    """A 64-bit number, ``(n,)`` uint64, that hangs on every part (integers, or ``(n,)``) and on their order: the
    finaliser of SplitMix64 (Steele et al., https://doi.org/10.1145/2660193.2660195) over each in turn.
    """
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = (state ^ _unsigned(part)) + _GOLDEN  # wraps, as unsigned numbers do
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _unsigned(part: np.ndarray | int) -> np.ndarray:
    return part.astype(np.uint64) if isinstance(part, np.ndarray) else np.full(1, part % 2**64, np.uint64)


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where each index goes in a permutation of ``range(size)``, of which there is one for each key.

    A Feistel network over the next power of 4, walked until it is inside (Black and Rogaway,
    https://doi.org/10.1007/3-540-45760-7_9): fewer than four steps on average.

    Args:
        index: ``(n,)`` int64, below ``size``.
        keys: ``(n,)`` uint64.

    Returns:
        ``(n,)`` int64.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    result = _feistel(index.astype(np.uint64), half, keys)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = _feistel(result[outside], half, keys[outside])
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _feistel(number: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = number >> shift, number & mask
    for step in range(_ROUNDS):
        left, right = right, left ^ (mix(keys, step, right) & mask)
    return (left << shift) | right


@dataclass(frozen=True)
class WindowShuffle:
    """An order of ``range(size)`` in which only a window is mixed at a time, so that reading stays within it.

    Runs of blocks that follow each other are put in any order, beginning somewhere; so many of them as fill a window
    are then mixed block by block. With ``size`` up to ``window`` that is any order of all. Without ``shuffle`` blocks
    come as they lie.
    """

    size: int
    window: int
    shuffle: bool = True

    def __call__(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The blocks ``(n,)`` at places ``(n,)`` int64 of the orders of the keys ``(n,)`` uint64."""
        if not self.shuffle:
            return places
        windows = places // self.window
        first = windows * self.window
        last = self.size // self.window
        slots = np.empty_like(places)
        for inside, length in (
            (windows < last, self.window),
            (windows == last, self.size - last * self.window),
        ):
            if inside.any():
                of_window = mix(keys[inside], windows[inside], 1)
                slots[inside] = first[inside] + permute(places[inside] - first[inside], length, of_window)
        runs, within = np.divmod(slots, RUN)
        whole = self.size // RUN
        if whole:
            moved = runs < whole  # what is left over stays the last
            runs[moved] = permute(runs[moved], whole, mix(keys[moved], 2))
        begin = (mix(keys, 3) % np.uint64(self.size)).astype(np.int64)
        return (begin + runs * RUN + within) % self.size
