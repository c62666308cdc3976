"""A single file, whose tensors are read and written one at a time.

``torch.save`` writes a zip of stored records: one pickle, and one record a storage. torch says where each begins, so
that its bytes can be read alone; and it writes a file with room for them, to be filled in.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_dist.checkpoint.files import put_in_place, remove_any, temporary_sibling
from lightning_dist.checkpoint.lazy import LazyTensor, bytes_of, read_into
from lightning_dist.pytree import Path as TreePath
from lightning_dist.pytree import map_leaves

_DESCRIPTOR = b"PK\x07\x08"
"""What stands between a record and its checksum, in the form of zip that torch writes."""

_CENTRAL = b"PK\x01\x02"


def lazily(tree: Any, path: Path) -> Any | None:
    """What ``torch.load`` gave under a ``FakeTensorMode``, with lazy tensors; None if it does not say where they are.

    Args:
        tree: nested containers.
        path: the file.
    """
    made: dict[tuple[Any, ...], LazyTensor] = {}
    is_whole = True

    def make(_: TreePath, value: Any) -> Any:
        nonlocal is_whole
        if not isinstance(value, Tensor):
            return value
        begin = offset_of(value)
        if begin is None:
            is_whole = False
            return value
        where = begin, int(value.storage_offset()), tuple(value.shape), value.stride(), value.dtype
        if where not in made:
            rows = partial(_read_rows, path, *where) if _has_rows_in_order(value) else None
            made[where] = LazyTensor(value.shape, value.dtype, partial(_read, path, *where), rows)
        return made[where]

    lazy = map_leaves(tree, make)
    return lazy if is_whole else None


def offset_of(fake: Tensor) -> int | None:
    """Where in the file the storage of a tensor begins, that was loaded under a ``FakeTensorMode``."""
    if fake.layout != torch.strided:
        return None
    # Public by torch's documentation of skip_data, for all its underscore.
    offset: int | None = getattr(fake.untyped_storage(), "_checkpoint_offset", None)
    return offset


def write_filled(tree: dict[str, Any], path: Path, advance: Callable[[int], None] = lambda count: None) -> None:
    """``torch.save`` of a tree whose tensors are lazy: a file with room for them, filled with one after the other.

    The file appears under its name when it is complete and on the disk; it holds its checksums.

    Args:
        tree: nested containers; plain tensors in it are written too.
        path: of the file.
        advance: told how many bytes have been written since it was last told.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    remove_any(temporary)
    try:
        _write(tree, temporary, advance)
        put_in_place(temporary, path)
    except BaseException:
        remove_any(temporary)
        raise


def _write(tree: dict[str, Any], path: Path, advance: Callable[[int], None]) -> None:
    sources: dict[TreePath, Any] = {}
    fakes: dict[int, Tensor] = {}
    mode = FakeTensorMode()

    def stand_in(place: TreePath, value: Any) -> Any:
        if not isinstance(value, (LazyTensor, Tensor)):
            return value
        sources[place] = value
        if id(value) not in fakes:
            with mode:
                fakes[id(value)] = torch.empty(value.shape, dtype=value.dtype)
        return fakes[id(value)]

    skeleton = map_leaves(tree, stand_in)
    with torch.serialization.skip_data(materialize_fake_tensors=True), path.open("wb") as file:
        torch.save(skeleton, file)
    with FakeTensorMode(allow_non_fake_inputs=True):
        # made just now, by us: what it holds was admitted when the source was opened
        written = torch.load(path, weights_only=False)
    begins: dict[int, Any] = {}

    def find(place: TreePath, value: Any) -> Any:
        begin = offset_of(value) if isinstance(value, Tensor) else None
        if begin is not None:
            begins.setdefault(begin, sources[place])
        return value

    map_leaves(written, find)
    with zipfile.ZipFile(path) as archive:
        records, central = archive.infolist(), archive.start_dir
    with path.open("r+b") as filled:
        checksums: dict[int, int] = {}
        for begin, source in sorted(begins.items(), key=lambda item: item[0]):
            filled.seek(begin)
            checksums[begin] = 0
            for data in source.pieces() if isinstance(source, LazyTensor) else [bytes_of(source)]:
                filled.write(data)
                checksums[begin] = zlib.crc32(data, checksums[begin])
                advance(len(data))
        _write_checksums(filled, records, central, checksums)
        filled.flush()
        os.fsync(filled.fileno())


def _write_checksums(file: BinaryIO, records: list[zipfile.ZipInfo], central: int, checksums: dict[int, int]) -> None:
    """Of records that were filled in: behind each, and in the directory at the file's end."""
    entry = central
    for record in records:
        begin = _data_offset(file, record)
        file.seek(entry)
        header = file.read(46)
        assert header[:4] == _CENTRAL
        if begin in checksums and record.file_size:
            crc = struct.pack("<L", checksums[begin])
            file.seek(entry + 16)
            file.write(crc)
            file.seek(begin + record.file_size)
            if file.read(4) == _DESCRIPTOR:
                file.seek(begin + record.file_size + 4)
                file.write(crc)
            else:
                file.seek(record.header_offset + 14)
                file.write(crc)
        entry += 46 + sum(struct.unpack("<HHH", header[28:34]))


def _data_offset(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    file.seek(record.header_offset)
    header = file.read(30)
    return record.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))


def _read(
    path: Path, begin: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    count = 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    memory = torch.empty(count, dtype=dtype)
    with path.open("rb") as file:
        file.seek(begin + offset * dtype.itemsize)
        read_into(file, memory)
    return memory.as_strided(shape, stride)


def _read_rows(
    path: Path,
    begin: int,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    first: int,
    last: int,
) -> Tensor:
    return _read(path, begin, offset + first * stride[0], (last - first, *shape[1:]), stride, dtype)


def _has_rows_in_order(tensor: Tensor) -> bool:
    """Whether what lies between two rows in memory is little beside them."""
    if not tensor.ndim:
        return False
    inner = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    return tensor.stride(0) >= 1 + sum((size - 1) * step for size, step in inner)
