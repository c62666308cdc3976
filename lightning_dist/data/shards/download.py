"""Copies of shards from URLs, checked on the way."""

from __future__ import annotations

import logging
import time
import zlib
from typing import IO

from fsspec.core import url_to_fs

from lightning_dist.data.shards.index import DamagedShard, Shard

ATTEMPTS = 5

_CHUNK = 4 << 20
_PAUSE = 0.5
"""Seconds after the first attempt that failed; twice as many after each other one."""

_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError)

log = logging.getLogger(__name__)


def download(url: str, shard: Shard | None, file: IO[bytes]) -> None:
    """Writes what is at a URL, with the bytes and the CRC-32 that its index says; again where reading fails.

    Args:
        url: of fsspec.
        shard: what the index says; None where nothing is known yet.
        file: to write to.

    Raises:
        FileNotFoundError, PermissionError: it can't be read, and it makes no sense to try again.
        DamagedShard: what is there is not what the index says.
        OSError: reading failed every time.
    """
    for attempt in range(1, ATTEMPTS + 1):
        file.seek(0)
        try:
            _copy(url, shard, file)
            return
        except _PERMANENT:
            raise
        except Exception as error:  # what a store that is away raises is its own affair
            if attempt == ATTEMPTS:
                if isinstance(error, DamagedShard):
                    raise
                raise OSError(f"{url} can't be read, in {ATTEMPTS} attempts; the last: {error!r}") from error
            log.warning("reading %s failed (%r), attempt %d of %d", url, error, attempt, ATTEMPTS)
            time.sleep(_PAUSE * 2 ** (attempt - 1))


def _copy(url: str, shard: Shard | None, file: IO[bytes]) -> None:
    # a file system belongs to the process that made it: fsspec gives each its own
    fs, path = url_to_fs(url)
    crc = size = 0
    with fs.open(path, "rb", block_size=_CHUNK) as source:
        while chunk := source.read(_CHUNK):
            file.write(chunk)
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    if shard is None:
        return
    if size != shard.num_bytes:
        raise DamagedShard(f"{url} has {size} bytes, and its index says {shard.num_bytes}; {REMEDY}")
    if crc != shard.crc32:
        raise DamagedShard(f"{url} has CRC-32 {crc:08x}, and its index says {shard.crc32:08x}; {REMEDY}")


REMEDY = "run `lightning-dist data check` on the index, or `lightning-dist data index` if the shards are new ones"
