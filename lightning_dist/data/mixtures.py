"""Samplers of one or several sources: each source in an order of its own, several interleaved by weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np

from lightning_dist.data.orders import ComputedOrder, ComputedSampler
from lightning_dist.data.permutation import mix

PERIOD = 1 << 16
"""Samples in which each source of a mixture has its share exactly."""


class Shuffle(Protocol):
    """An order of ``range(size)`` for each key."""

    @property
    def size(self) -> int:
        """Samples of it."""

    def __call__(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The samples ``(n,)`` at places ``(n,)`` int64 of the orders of the keys ``(n,)`` uint64."""


class MixtureSampler(ComputedSampler):
    """The order of an epoch's samples, computed by index from seed and epoch: no permutation is held.

    It is one order of all data ranks, of which each rank's loader takes its part under the strategy, and in one process
    the whole. With ``weights`` the sources are interleaved evenly. A source that comes to its end begins again in
    another order; one that an epoch does not come to the end of goes on in the next, so that none of its samples comes
    a second time before each has come once.

    Args:
        sources: orders of the data set's samples, one after the other; a single one without ``weights``.
        seed: of the order; by default that of ``seed_everything``, or 0.
        weights: share of each source in the samples of an epoch, in any unit; by default all samples come once.
        num_samples: of an epoch; by default as many as there are.

    Raises:
        ValueError: weights of another number of sources, or that are not positive or too small; no samples.
    """

    def __init__(
        self,
        sources: Sequence[Shuffle],
        *,
        seed: int | None = None,
        weights: Sequence[float] | None = None,
        num_samples: int | None = None,
    ) -> None:
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        sizes = [source.size for source in sources]
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1")
        self._sources = list(sources)
        self._first = np.cumsum([0, *sizes[:-1]])
        self._interleaving = None if weights is None else Interleaving(_shares(weights, len(sizes)))
        self.num_samples = sum(sizes) if num_samples is None else num_samples

    def __len__(self) -> int:
        return self.num_samples

    def order(self, epoch: int) -> ComputedOrder:
        """The samples of an epoch, as indices of the data set."""
        return ComputedOrder(partial(self._samples_at, epoch * self.num_samples), self.num_samples)

    def _samples_at(self, before: int, places: np.ndarray) -> np.ndarray:
        places = before + places
        if self._interleaving is None:
            return self._of_source(0, places)
        sources, counts = self._interleaving(places)
        samples = np.empty_like(places)
        for source in np.unique(sources):
            mine = sources == source
            samples[mine] = self._of_source(int(source), counts[mine])
        return samples

    def _of_source(self, source: int, counts: np.ndarray) -> np.ndarray:
        """The samples that a source gives after so many of its own since the run began."""
        shuffled = self._sources[source]
        passes, places = np.divmod(counts, shuffled.size)
        return self._first[source] + shuffled(places, mix(self.seed, np.full_like(passes, source), passes))


class Interleaving:
    """Which source each place of a mixture is of, as evenly spread as their shares allow, again every ``PERIOD``.

    Args:
        shares: samples of each source in a period.
    """

    def __init__(self, shares: Sequence[int]) -> None:
        self._shares = np.asarray(shares, np.int64)
        sources = np.repeat(np.arange(len(shares), dtype=np.int32), shares)
        counts = np.concatenate([np.arange(share, dtype=np.int32) for share in shares])
        order = np.argsort((counts + 0.5) / self._shares[sources], kind="stable")
        self._sources, self._counts = sources[order], counts[order]

    def __call__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source at each place ``(n,)``, and how many places before it are of the same."""
        periods, within = np.divmod(places, PERIOD)
        sources = self._sources[within]
        return sources, periods * self._shares[sources] + self._counts[within]


def _shares(weights: Sequence[float], num_sources: int) -> list[int]:
    """Of a period, by largest remainders."""
    given = np.asarray(weights, np.float64)
    if given.shape != (num_sources,) or not (np.isfinite(given).all() and (given > 0).all()):
        raise ValueError(f"weights={list(weights)} must be one positive number for each of the {num_sources} sources")
    exact = given / given.sum() * PERIOD
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: PERIOD - shares.sum()]] += 1
    if not shares.all():
        raise ValueError(f"weights={list(weights)}: a source needs at least 1 in {PERIOD} of their sum; leave it out")
    return shares.tolist()
