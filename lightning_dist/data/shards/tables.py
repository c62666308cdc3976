"""Samples in Parquet files: a row each. For reading in any order they are turned into Arrow's own format once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from lightning_dist.data.shards.index import DamagedShard

_ROWS = 256
"""Of a batch in Arrow's format."""


def parquet_file(file: Any, url: str) -> Any:
    """pyarrow's, of a path or an open file.

    Raises:
        ValueError: pyarrow is not installed.
        DamagedShard: it is no Parquet file.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(
            f"{url} is a Parquet file, and pyarrow is not installed; run `pip install 'lightning-dist[parquet]'`"
        ) from None
    try:
        return ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise DamagedShard(f"{url} is no Parquet file, or a damaged one: {error}") from error


def count_rows(file: Any, url: str) -> int:
    """Of a whole file, every row of which is read; a DamagedShard where one can't be."""
    table, rows = parquet_file(file, url), 0
    for batch in _batches(table, None, url):
        rows += batch.num_rows
    if rows != table.metadata.num_rows:
        raise DamagedShard(f"{url} has {rows} rows, and its footer says {table.metadata.num_rows}")
    return rows


def decoded_bytes(file: Any, columns: Sequence[str] | None, url: str) -> int:
    """Of the columns in memory, about: what the footer says."""
    metadata = parquet_file(file, url).metadata
    total = 1 << 16
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            if columns is None or chunk.path_in_schema.split(".")[0] in columns:
                total += chunk.total_uncompressed_size
    return total


def convert(file: Any, columns: Sequence[str] | None, url: str, target: IO[bytes]) -> None:
    """Writes the columns of a Parquet file in Arrow's format, of which any row is read without those before it.

    A row group is in memory at a time.

    Raises:
        ValueError: a column that it has not.
        DamagedShard: it can't be read.
    """
    from pyarrow import ipc

    table = parquet_file(file, url)
    names = table.schema_arrow.names
    for name in columns or ():
        if name not in names:
            raise ValueError(f"{url} has no column {name!r}; it has {', '.join(names)}")
    kept = [name for name in names if columns is None or name in columns]
    schema = table.schema_arrow.empty_table().select(kept).schema
    with ipc.new_file(target, schema) as writer:
        for batch in _batches(table, kept, url):  # pyarrow gives columns in the order that they are asked for
            writer.write_batch(batch)


def _batches(table: Any, columns: Sequence[str] | None, url: str) -> Any:
    from pyarrow import ArrowException

    try:
        for group in range(table.num_row_groups):
            yield from table.iter_batches(_ROWS, row_groups=[group], columns=columns, use_threads=False)
    except (ArrowException, OSError) as error:
        raise DamagedShard(f"{url} is damaged: {error}") from error


class TableShard:
    """The rows of a file that :func:`convert` wrote, which is mapped: what is not read takes no memory.

    Args:
        path: of the file, which may be removed while it is open.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow

        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches])
        self._names = reader.schema.names

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._batches else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The values of a row by the names of its columns, as Python's."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        batch = self._batches[which]
        row = index - int(self._ends[which]) + batch.num_rows
        return {name: batch.column(number)[row].as_py() for number, name in enumerate(self._names)}
