"""An interpolated Kneser-Ney model of n tokens, the simplest that still sees context."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.integer]
Numbers = NDArray[np.int64]


class KneserNey:
    """Counts of a text, each lowered by a discount that the probability of a shorter context gets
    (https://doi.org/10.1109/ICASSP.1995.479394). Below the highest order a token counts once for each token that it
    follows. One discount an order, ``n1 / (n1 + 2 n2)`` of the grams that are seen once and twice,
    or one half where none is seen once.

    Args:
        tokens: the text to learn from, ``(length,)``.
        order: tokens of a gram, the foretold one included; 1 or more.
        vocab_size: of the tokens.

    Raises:
        ValueError: grams that do not fit 63 bits.
    """

    def __init__(self, tokens: Tokens, order: int, vocab_size: int) -> None:
        if order < 1 or order * np.log2(vocab_size) > 63:
            raise ValueError(
                f"grams of {order} tokens of {vocab_size} don't fit 63 bits; pass a lower order, 1 or more"
            )
        self.order, self.vocab_size = order, vocab_size
        grams, counts = np.unique(_grams(tokens, order, vocab_size), return_counts=True)
        levels = [_Level(grams, counts, vocab_size)]
        for length in range(order - 1, 0, -1):
            grams, counts = np.unique(grams % vocab_size**length, return_counts=True)
            levels.append(_Level(grams, counts, vocab_size))
        self._levels = levels[::-1]

    def nats(self, tokens: Tokens) -> NDArray[np.float64]:
        """Loss of every token but the first, ``(length - 1,)``; context that is not there is left out."""
        probability = np.full(len(tokens) - 1, 1 / self.vocab_size)
        for length, level in enumerate(self._levels, 1):
            seen = max(length - 1, 1)  # the first tokens have a shorter context
            grams = _grams(tokens[1:] if length == 1 else tokens, length, self.vocab_size)
            probability[seen - 1 :] = level.interpolate(grams, probability[seen - 1 :])
        return -np.log(probability)


class _Level:
    """The grams of one length, sorted, with their counts, and the contexts of them."""

    def __init__(self, grams: Numbers, counts: Numbers, vocab_size: int) -> None:
        self.grams, self.counts, self.vocab_size = grams, counts, vocab_size
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        self.discount = once / (once + 2 * twice) if once else 0.5
        self.contexts, first, self.followers = np.unique(grams // vocab_size, return_index=True, return_counts=True)
        self.totals = np.add.reduceat(counts, first)

    def interpolate(self, grams: Numbers, shorter: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probabilities of the last tokens of grams, from those that a shorter context gives."""
        counts = _look_up(self.grams, self.counts, grams)
        contexts = grams // self.vocab_size
        totals = _look_up(self.contexts, self.totals, contexts)
        followers = _look_up(self.contexts, self.followers, contexts)
        known = np.maximum(counts - self.discount, 0) + self.discount * followers * shorter
        return np.where(totals > 0, known / np.maximum(totals, 1), shorter)


def _grams(tokens: Tokens, length: int, vocab_size: int) -> Numbers:
    """Each run of ``length`` tokens as one number, the last token its lowest digit."""
    whole = tokens.astype(np.int64)
    found = np.zeros(max(len(whole) - length + 1, 0), dtype=np.int64)
    for offset in range(length):
        found = found * vocab_size + whole[offset : offset + len(found)]
    return found


def _look_up(keys: Numbers, values: Numbers, wanted: Numbers) -> Numbers:
    """The value of each wanted key, 0 where there is none."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
