"""ShardDataset: samples of tar and Parquet files, wherever they are, each of which is read when it is asked for."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_dist.data.shards.cache import ShardCache
from lightning_dist.data.shards.decoding import DECODERS, Decoder, decode_parts, decoders_of
from lightning_dist.data.shards.index import Shard, ShardIndex, is_url, read_index
from lightning_dist.data.shards.opening import ShardOpener
from lightning_dist.data.shards.prefetch import Prefetcher
from lightning_dist.data.shards.tables import TableShard
from lightning_dist.data.shards.tars import TarShard

_OPEN = 32
"""Shards that stay open."""


class ShardDataset(Dataset[Any]):
    """The samples of indexed shards, the indexes one after the other; read with
    :class:`~lightning_dist.data.ShardSampler`, on any number of data ranks.

    A sample of tars is ``{"__key__": name up to the first dot, extension: decoded member, ...}``, one of Parquet files
    a row, ``{column: value, ...}``. What lies at a URL is copied into the cache shard by shard; tables go through it
    from the disk too, in Arrow's format, of which any row can be read. Nothing is communicated; processes of a machine
    share the cache. It can be sent to other processes.

    Args:
        indexes: one or several that ``lightning-dist data index`` wrote, or their directories; paths or URLs of fsspec.
        transform: of a sample, to what the data set gives; after decoding.
        decoders: by extension (of tars, over :data:`~lightning_dist.data.shards.decoding.DECODERS`) or by column: a
            function of bytes, the extension of a decoder there, or None for bytes.
        columns: of Parquet files that are read; by default all.
        cache: of this machine, or its directory; by default ``ShardCache()``.

    Raises:
        FileNotFoundError, DamagedShard, ValueError: see :func:`~lightning_dist.data.shards.index.read_index`.
        ValueError: no samples, or columns of tars. On reading, a shard that is larger than the cache, or bytes that
            can't be decoded; an OSError where a URL can't be read.
    """

    def __init__(
        self,
        indexes: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        transform: Callable[[dict[str, Any]], Any] | None = None,
        decoders: Mapping[str, Decoder | str | None] | None = None,
        columns: Sequence[str] | None = None,
        cache: ShardCache | str | os.PathLike[str] | None = None,
    ) -> None:
        given = [indexes] if isinstance(indexes, str | os.PathLike) else indexes
        self.indexes: list[ShardIndex] = [read_index(place) for place in given]
        self.transform, self.cache = transform, cache if isinstance(cache, ShardCache) else ShardCache(cache)
        for index in self.indexes:
            if not index.num_samples:
                raise ValueError(f"the shards of {index.folder} have no samples")
            if columns is not None and index.kind == "tar":
                raise ValueError(f"columns={list(columns)} are of Parquet files, and {index.folder} has tars")
        own = decoders_of(decoders or {})
        self._decoders = {"tar": {**DECODERS, **own}, "parquet": own}
        self._opener = ShardOpener(self.cache, None if columns is None else tuple(sorted(set(columns))))
        self._shards: list[tuple[ShardIndex, Shard]] = [(i, shard) for i in self.indexes for shard in i.shards]
        self._ends = np.cumsum([shard.num_samples for _, shard in self._shards])
        self._open: OrderedDict[int, TarShard | TableShard] = OrderedDict()
        self._prefetcher: Prefetcher | None = None

    @property
    def sizes_of_sources(self) -> list[list[int]]:
        """Samples of each shard, by index."""
        return [[shard.num_samples for shard in index.shards] for index in self.indexes]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        source, shard = self._shards[which]
        sample = self._shard(which)[int(index) - int(self._ends[which]) + shard.num_samples]
        sample = decode_parts(sample, self._decoders[source.kind], source.url(shard))
        return sample if self.transform is None else self.transform(sample)

    def _shard(self, which: int) -> TarShard | TableShard:
        if which in self._open:
            self._open.move_to_end(which)
            return self._open[which]
        if len(self._open) >= _OPEN:
            self._open.popitem(last=False)
        self._open[which] = opened = self._opener.open(*self._shards[which])
        return opened

    def prefetch(self, samples: np.ndarray) -> None:
        """Begins to bring the shards of samples ``(n,)`` into the cache, in their order; the sampler announces them."""
        which = np.searchsorted(self._ends, samples, side="right")
        _, first = np.unique(which, return_index=True)
        shards = [int(shard) for shard in which[np.sort(first)] if self._is_copied(int(shard))]
        # what is fetched takes the room of what was read, but not of what is being read
        together = np.cumsum([self._shards[shard][1].num_bytes for shard in shards])
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(lambda shard: self._opener.fetch(*self._shards[shard]))
        self._prefetcher.ask(shards[: int(np.searchsorted(together, self.cache.max_bytes / 2, side="right"))])

    def _is_copied(self, which: int) -> bool:
        source, shard = self._shards[which]
        return source.kind == "parquet" or is_url(source.url(shard))

    def bytes_read(self, num_samples: int) -> float:
        """Of the cache that shards of so many samples take, about; 0 where they are read in their place."""
        copied = [shard for number, (_, shard) in enumerate(self._shards) if self._is_copied(number)]
        total = sum(shard.num_samples for shard in copied)
        return sum(shard.num_bytes for shard in copied) / total * num_samples if total else 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict(), "_prefetcher": None}
