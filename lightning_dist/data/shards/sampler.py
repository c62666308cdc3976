"""ShardSampler: the order in which the samples of shards are read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_dist.data.mixtures import MixtureSampler
from lightning_dist.data.orders import ComputedOrder
from lightning_dist.data.permutation import mix, permute
from lightning_dist.data.shards.dataset import ShardDataset


class ShardSampler(MixtureSampler):
    """The order of an epoch's samples, computed by index from seed and epoch: shards in any order, and samples mixed
    within windows of it, see :class:`ShardShuffle`.

    It is one order of all data ranks, of which each rank's loader takes its part under the strategy, and in one process
    the whole. So a batch of all ranks together is that of one process, and each machine reads the shards of all ranks;
    with ``num_canonical_ranks=n`` it reads those of its own on n data ranks, or any number that divides n. A loader
    that reads an order has the shards fetched that are next.

    ``seed``, ``shuffle``, ``weights`` and ``num_samples`` are those of
    :class:`~lightning_dist.data.mixtures.MixtureSampler`, each index of the data set a source.

    Args:
        dataset: whose samples.
        window: samples that are mixed with each other, in each part.
        num_canonical_ranks: parts of the shards, of which the order takes one sample each in turn.

    Raises:
        ValueError: weights that can't be, or with parts, which a mixture does not keep; no samples.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        seed: int | None = None,
        shuffle: bool = True,
        window: int = 1 << 14,
        num_canonical_ranks: int = 1,
        weights: Sequence[float] | None = None,
        num_samples: int | None = None,
    ) -> None:
        if window < 1 or num_canonical_ranks < 1:
            raise ValueError(f"window={window} and num_canonical_ranks={num_canonical_ranks} must be at least 1")
        if weights is not None and num_canonical_ranks > 1:
            raise ValueError(
                f"num_canonical_ranks={num_canonical_ranks} with weights=: a mixture takes its sources in turn, so "
                "that no rank would read shards of its own; leave one of them out"
            )
        sizes = dataset.sizes_of_sources
        if weights is None:
            sizes = [[size for source in sizes for size in source]]
        window = window if shuffle else 1
        sources = [ShardShuffle(each, window, num_canonical_ranks, shuffle) for each in sizes]
        super().__init__(sources, seed=seed, weights=weights, num_samples=num_samples)
        self._dataset, self.shuffle, self.window = dataset, shuffle, window
        needed = dataset.bytes_read(window * num_canonical_ranks * len(sources))
        if needed > dataset.cache.max_bytes:
            rank_zero_warn(
                f"samples are mixed over some {needed:,.0f} bytes of shards, and the cache {dataset.cache.folder} may "
                f"have {dataset.cache.max_bytes:,}, so shards are fetched again and again; make window= smaller, or "
                "the cache larger"
            )

    def order(self, epoch: int) -> ComputedOrder:
        """The samples of an epoch, as indices of the data set."""
        order = super().order(epoch)
        return ComputedOrder(order.samples_at, len(order), announce=self._dataset.prefetch)


class ShardShuffle:
    """Orders of the samples of shards: the shards are permuted, and the row of their samples cut into equal parts; in
    each part so many samples that follow each other are mixed at a time; the order takes of each part in turn.

    Args:
        sizes: samples of each shard.
        window: samples that are mixed.
        num_parts: into which the row is cut.
        shuffle: else shards and samples come as they lie.
    """

    def __init__(self, sizes: Sequence[int], window: int, num_parts: int = 1, shuffle: bool = True) -> None:
        self._sizes = np.asarray(sizes, np.int64)
        self.size, self.window, self.shuffle = int(self._sizes.sum()), window, shuffle
        self._starts = np.cumsum(self._sizes) - self._sizes
        parts = np.arange(num_parts, dtype=np.int64)
        self._lengths = self.size // num_parts + (parts < self.size % num_parts)
        self._first = np.cumsum(self._lengths) - self._lengths
        self._rows = OrderedDict[int, tuple[np.ndarray, np.ndarray]]()

    def __call__(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The samples ``(n,)`` at places ``(n,)`` int64 of the orders of the keys ``(n,)`` uint64."""
        samples = np.empty_like(places)
        keys = np.broadcast_to(keys, places.shape)
        for key in np.unique(keys):
            mine = keys == key
            shards, ends = self._row(int(key))
            slots = self._slots(places[mine], keys[mine])
            which = np.searchsorted(ends, slots, side="right")
            shard = shards[which]
            samples[mine] = self._starts[shard] + slots - ends[which] + self._sizes[shard]
        return samples

    def _slots(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Where in the row of shards the samples at places are."""
        within, part = np.divmod(places, len(self._lengths))
        if not self.shuffle:
            return self._first[part] + within
        windows = within // self.window
        begin = windows * self.window
        lengths = np.minimum(self.window, self._lengths[part] - begin)
        of_window = mix(keys, part, windows, 1)
        for length in np.unique(lengths):
            here = lengths == length
            within[here] = begin[here] + permute(within[here] - begin[here], int(length), of_window[here])
        return self._first[part] + within

    def _row(self, key: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of a key, and where each ends in the row of their samples."""
        if key not in self._rows:
            shards = np.arange(len(self._sizes), dtype=np.int64)
            if self.shuffle:
                shards = permute(shards, len(shards), np.broadcast_to(mix(key, 2), shards.shape))
            self._rows[key] = shards, np.cumsum(self._sizes[shards])
            if len(self._rows) > 4:
                self._rows.popitem(last=False)
        return self._rows[key]
