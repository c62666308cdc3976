"""Shards looked at as a whole: indexed, and compared with their index."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, cast

from lightning_dist.checkpoint.checksums import checksum_of
from lightning_dist.data.shards.download import download
from lightning_dist.data.shards.index import (
    INDEX,
    DamagedShard,
    Shard,
    ShardIndex,
    index_place,
    is_url,
    list_shards,
    local_path,
    read_index,
    refuse_read_only,
    relative_to,
    write_index,
)
from lightning_dist.data.shards.tables import count_rows
from lightning_dist.data.shards.tars import read_members

_THREADS = 4

Progress = Callable[[int, int], None]
"""Called with the shards that were looked at, and all."""


@dataclass(frozen=True)
class DamagedFile:
    """A shard, by its name or URL, and what is wrong with it in words; its samples where an index has them."""

    name: str
    what: str
    num_samples: int = 0


def scan_shards(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    progress: Progress = lambda done, total: None,
    is_written: bool = True,
) -> tuple[str, ShardIndex, list[DamagedFile]]:
    """Reads shards, and tells what an index of them has to have; nothing is written.

    Args:
        sources: see :func:`~lightning_dist.data.shards.index.list_shards`.
        output: where the index is to be; by default ``shards.json`` beside the first shard.
        progress: see :data:`Progress`.
        is_written: the index is about to be written.

    Returns:
        The place of the index; the index of the shards that are whole; the others.

    Raises:
        FileNotFoundError, ValueError: see :func:`~lightning_dist.data.shards.index.list_shards`. ValueError also where
            nothing can be written to, before a shard is read.
    """
    kind, urls = list_shards(sources)
    place = index_place(f"{urls[0].rpartition('/')[0]}/{INDEX}" if output is None else output)
    if is_written:
        refuse_read_only(place)
    folder = place.rpartition("/")[0]
    shards: list[Shard] = []
    damaged: list[DamagedFile] = []
    for url, found in _each(urls, lambda url: _scan(url, kind), progress):
        if isinstance(found, str):
            damaged.append(DamagedFile(url, found))
        else:
            shards.append(replace(found, name=relative_to(folder, url)))
    return place, ShardIndex(folder, kind, tuple(shards), tuple(relative_to(folder, d.name) for d in damaged)), damaged


def index_shards(sources: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None) -> ShardIndex:
    """Writes the index of shards, all of which are read: sizes, checksums, and how many samples each has.

    Args:
        sources, output: see :func:`scan_shards`.

    Raises:
        DamagedShard: a shard can't be read; nothing is written.
        FileNotFoundError, ValueError: see :func:`~lightning_dist.data.shards.index.list_shards`.
    """
    place, index, damaged = scan_shards(sources, output)
    if damaged:
        raise DamagedShard(f"{damaged[0].what}; {len(damaged)} of the shards can't be indexed")
    write_index(place, index)
    return index


def check_index(
    place: str | os.PathLike[str], progress: Progress = lambda done, total: None
) -> tuple[ShardIndex, list[DamagedFile]]:
    """Reads every shard of an index and compares size and checksum.

    Raises:
        FileNotFoundError, DamagedShard, ValueError: see :func:`~lightning_dist.data.shards.index.read_index`.
    """
    index = read_index(place)
    found = _each(list(index.shards), lambda shard: _compare(index.url(shard), shard), progress)
    return index, [DamagedFile(shard.name, what, shard.num_samples) for shard, what in found if what is not None]


def drop_shards(place: str | os.PathLike[str], index: ShardIndex, damaged: Sequence[DamagedFile]) -> ShardIndex:
    """Writes the index without the damaged shards, whose files stay.

    Raises:
        ValueError: none would be left.
    """
    names = {damage.name for damage in damaged}
    left = tuple(shard for shard in index.shards if shard.name not in names)
    if not left:
        raise ValueError(f"all shards of {index_place(place)} are damaged, so none would be left")
    index = replace(index, shards=left, dropped=(*index.dropped, *sorted(names - set(index.dropped))))
    write_index(place, index)
    return index


def _each(items: list, look: Callable, progress: Progress) -> Iterator:
    with ThreadPoolExecutor(_THREADS) as threads:
        for number, pair in enumerate(zip(items, threads.map(look, items), strict=True), 1):
            yield pair
            progress(number, len(items))


def _scan(url: str, kind: str) -> Shard | str:
    try:
        with _local_file(url) as path:
            size, crc = checksum_of(path)
            with path.open("rb") as file:
                count = len(read_members(file, url)) if kind == "tar" else count_rows(file, url)
            return Shard(url, size, count, crc)
    except (DamagedShard, OSError) as error:
        return _in_words(url, error)


def _compare(url: str, shard: Shard) -> str | None:
    try:
        if is_url(url):
            download(url, shard, cast(IO[bytes], _Nowhere()))
            return None
        size, crc = checksum_of(Path(local_path(url)))
    except (DamagedShard, OSError) as error:
        return _in_words(url, error)
    if size != shard.num_bytes:
        return f"{url} has {size} bytes, and its index says {shard.num_bytes}"
    if crc != shard.crc32:
        return f"{url} has CRC-32 {crc:08x}, and its index says {shard.crc32:08x}"
    return None


def _in_words(url: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{url} is missing"
    return str(error).partition("; ")[0] if isinstance(error, DamagedShard) else f"{url} can't be read ({error})"


@contextmanager
def _local_file(url: str) -> Iterator[Path]:
    if not is_url(url):
        yield Path(local_path(url))
        return
    with tempfile.NamedTemporaryFile(prefix="lightning_dist-") as file:
        download(url, None, cast(IO[bytes], file))
        file.truncate()
        file.flush()
        yield Path(file.name)


class _Nowhere:
    """A file for what is only looked at on its way."""

    def write(self, data: bytes) -> int:
        return len(data)

    def seek(self, place: int) -> int:
        return place
