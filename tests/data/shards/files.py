"""Small shards: tars and Parquet files whose samples are their numbers."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow
import pyarrow.parquet


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for end, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def numbered_tars(folder: Path, sizes: Iterable[int], padding: int = 0) -> Path:
    """``shard-0.tar``, ...; sample k of all has ``cls`` k, ``json`` [k], and so many bytes of ``bin``."""
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    for number, size in enumerate(sizes):
        samples = [
            (f"{k:06d}", {"cls": b"%d" % k, "json": json.dumps([k]).encode(), "bin": b"%d" % (k % 10) * padding})
            for k in range(done, done + size)
        ]
        write_tar(folder / f"shard-{number:04d}.tar", samples)
        done += size
    return folder


def numbered_tables(folder: Path, sizes: Iterable[int], rows: int = 5) -> Path:
    """``shard-0.parquet``, ...; row k of all has ``cls`` k, ``name`` and ``data``; so many rows in a row group."""
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    for number, size in enumerate(sizes):
        numbers = list(range(done, done + size))
        table = pyarrow.table(
            {"cls": numbers, "name": [f"n{k}" for k in numbers], "data": [b"%d" % k for k in numbers]}
        )
        pyarrow.parquet.write_table(table, folder / f"shard-{number:04d}.parquet", row_group_size=rows)
        done += size
    return folder
