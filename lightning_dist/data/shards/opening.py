"""How a shard is opened, wherever it is: on the disk, or at a URL through the cache."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lightning_dist.data.shards.cache import ShardCache
from lightning_dist.data.shards.download import REMEDY, download
from lightning_dist.data.shards.index import DamagedShard, Shard, ShardIndex, is_url, local_path
from lightning_dist.data.shards.tables import TableShard, convert, decoded_bytes
from lightning_dist.data.shards.tars import TarMembers, TarShard, read_members


@dataclass(frozen=True)
class ShardOpener:
    """Opens shards by a cache, which holds what comes from URLs, where members of tars are, and decoded tables.

    Args:
        cache: of this machine.
        columns: of tables that are read; None for all.
    """

    cache: ShardCache
    columns: tuple[str, ...] | None

    def open(self, index: ShardIndex, shard: Shard) -> TarShard | TableShard:
        """A shard with the samples that its index says.

        Raises:
            FileNotFoundError, OSError, DamagedShard: see :func:`~lightning_dist.data.shards.download.download`.
            ValueError: it is larger than the cache, or has not the columns.
        """
        url = index.url(shard)
        opened = self._open_tar(url, shard) if index.kind == "tar" else self._open_table(url, shard)
        if len(opened) != shard.num_samples:
            raise DamagedShard(f"{url} has {len(opened)} samples, and its index says {shard.num_samples}; {REMEDY}")
        return opened

    def fetch(self, index: ShardIndex, shard: Shard) -> None:
        """Brings a shard into the cache, for whoever opens it next; nothing where another process is at it."""
        url = index.url(shard)
        if index.kind == "tar" and is_url(url):
            self.cache.add(_name(url, shard, ".tar"), shard.num_bytes, lambda file: download(url, shard, file))
        elif index.kind == "parquet" and self._table_name(url, shard) not in self.cache:
            self._open_table(url, shard)

    def _open_tar(self, url: str, shard: Shard) -> TarShard:
        file = self._open_file(url, shard, ".tar")
        # on the disk nobody compares checksums: of a file that was written anew, other members may be somewhere else
        written = () if is_url(url) else (os.fstat(file).st_mtime_ns,)
        try:
            members = self.cache.open(
                _name(url, shard, ".members", *written),
                128 * shard.num_samples + (1 << 16),
                lambda target: _members_of(file, url).save(target),
                TarMembers.load,
            )
        except BaseException:
            os.close(file)
            raise
        return TarShard(file, members, url)

    def _table_name(self, url: str, shard: Shard) -> str:
        return _name(url, shard, ".arrow", *(self.columns or ()))

    def _open_table(self, url: str, shard: Shard) -> TableShard:
        name = self._table_name(url, shard)
        with suppress(FileNotFoundError):
            return self.cache.get(name, TableShard)
        with os.fdopen(self._open_file(url, shard, ".parquet"), "rb") as source:
            size = decoded_bytes(source, self.columns, url)
            opened = self.cache.open(name, size, lambda target: convert(source, self.columns, url, target), TableShard)
        if is_url(url):
            self.cache.remove(_name(url, shard, ".parquet"))
        return opened

    def _open_file(self, url: str, shard: Shard, end: str) -> int:
        """A descriptor of a shard's file on this machine."""
        if is_url(url):
            name = _name(url, shard, end)
            return self.cache.open(name, shard.num_bytes, lambda file: download(url, shard, file), open_descriptor)
        try:
            file = open_descriptor(Path(local_path(url)))
        except FileNotFoundError:
            raise FileNotFoundError(f"{url} is missing, which its index has; {REMEDY}") from None
        if (size := os.fstat(file).st_size) != shard.num_bytes:
            os.close(file)
            raise DamagedShard(f"{url} has {size} bytes, and its index says {shard.num_bytes}; {REMEDY}")
        return file


def open_descriptor(path: Path) -> int:
    """Of a file, to read."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))


def _members_of(file: int, url: str) -> TarMembers:
    with os.fdopen(os.dup(file), "rb") as tar:
        return read_members(tar, url)


def _name(url: str, shard: Shard, end: str, *parts: str | int) -> str:
    """In the cache: of what is at the URL now, and no other that was there before."""
    digest = hashlib.sha256(repr((url, shard.num_bytes, shard.crc32, parts)).encode()).hexdigest()
    return f"{digest[:32]}{end}"
