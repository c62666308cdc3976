"""Checkpoints whose tensors are written one at a time, in the memory of the largest: a file, or a directory of shards.

A single file is a zip of stored records: one pickle, and one record a storage. torch writes the file with room for them
and says where each begins; they are filled in one after the other.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from lightning_dist.checkpoint.lazy_tensors import LazyTensor, bytes_of, read_lazy
from lightning_dist.checkpoint.locations import written_beside
from lightning_dist.checkpoint.reader import place_of_storage
from lightning_dist.checkpoint.sharded_save import Shards, is_large, save_sharded
from lightning_dist.compat.torch import FakeTensorMode
from lightning_dist.pytree import Path as TreePath
from lightning_dist.pytree import map_leaves

_PART = 1 << 25
"""Bytes of a part of a sharded checkpoint that is written by rows."""

_DESCRIPTOR = b"PK\x07\x08"
"""What stands between a record and its checksum, in the form of zip that torch writes."""

_CENTRAL = b"PK\x01\x02"


def write_streaming_file(tree: dict[str, Any], path: Path, advance: Callable[[int], None] = lambda count: None) -> None:
    """``torch.save`` of a tree whose tensors are lazy: a file with room for them, filled with one after the other.

    The file appears under its name when it is complete and on the disk; it holds its checksums.

    Args:
        tree: nested containers; plain tensors in it are written too.
        path: of the file.
        advance: told how many bytes have been written since it was last told.
    """
    with written_beside(path) as temporary:
        sources = _write_empty(tree, temporary)
        with zipfile.ZipFile(temporary) as archive:
            records, central = archive.infolist(), archive.start_dir
        with temporary.open("r+b") as file:
            checksums: dict[int, int] = {}
            for begin, source in sorted(sources.items(), key=lambda item: item[0]):
                file.seek(begin)
                checksums[begin] = 0
                for data in source.pieces() if isinstance(source, LazyTensor) else [bytes_of(source)]:
                    file.write(data)
                    checksums[begin] = zlib.crc32(data, checksums[begin])
                    advance(len(data))
            _write_checksums(file, records, central, checksums)
            file.flush()
            os.fsync(file.fileno())


def _write_empty(tree: dict[str, Any], path: Path) -> dict[int, Any]:
    """Writes the file with room for its tensors; returns what of them is to be written where."""
    sources: dict[TreePath, Any] = {}
    fakes: dict[int, Tensor] = {}
    mode = FakeTensorMode()

    def fake(place: TreePath, value: Any) -> Any:
        if not isinstance(value, (LazyTensor, Tensor)):
            return value
        sources[place] = value
        if id(value) not in fakes:
            with mode:
                fakes[id(value)] = torch.empty(value.shape, dtype=value.dtype)
        return fakes[id(value)]

    fake_tree = map_leaves(tree, fake)
    with torch.serialization.skip_data(materialize_fake_tensors=True), path.open("wb") as file:
        torch.save(fake_tree, file)
    with FakeTensorMode(allow_non_fake_inputs=True):
        # made just now, by us: what it holds was admitted when the source was opened
        written = torch.load(path, weights_only=False)
    begins: dict[int, Any] = {}

    def find(place: TreePath, value: Any) -> Any:
        begin = place_of_storage(value) if isinstance(value, Tensor) else None
        if begin is not None:
            begins.setdefault(begin, sources[place])
        return value

    map_leaves(written, find)
    return begins


def _write_checksums(file: BinaryIO, records: list[zipfile.ZipInfo], central: int, checksums: dict[int, int]) -> None:
    """Writes those of records that were filled in, behind each and into the directory at the file's end."""
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


def write_streaming_directory(checkpoint: dict[str, Any], path: Path, advance: Callable[[int], None]) -> None:
    """Writes a directory of shards, by one process, of a tree whose tensors are lazy.

    Args:
        checkpoint: nested containers.
        path: of the directory, local or at a URL.
        advance: told how many bytes have been read since it was last told.
    """
    checkpoint = read_lazy(checkpoint, unless=is_large)
    lazies: dict[int, LazyTensor] = {}
    fakes: dict[int, Tensor] = {}

    def fake(_: TreePath, value: Any) -> Any:
        if not isinstance(value, LazyTensor):
            return value
        if id(value) not in fakes:
            fakes[id(value)] = torch.empty(value.shape, dtype=value.dtype, device="meta")
        lazies[id(fakes[id(value)])] = value
        return fakes[id(value)]

    tree = map_leaves(checkpoint, fake)
    shards = Shards.of(tree, writes_plain=True)
    sources = {}
    for key, place in shards.places:
        node = tree
        for step in place:
            node = node[step]
        sources[key] = lazies[id(node)]
    save_sharded(shards, path, planner=_LazyPlanner(sources, advance))


class _LazyPlanner(DefaultSavePlanner):
    """Reads a tensor when it is written, large ones by rows, and lets what was read before go.

    Args:
        sources: by the key of the tensor in the directory.
        advance: told how many bytes have been read since it was last told.
    """

    def __init__(self, sources: Mapping[str, LazyTensor], advance: Callable[[int], None]) -> None:
        super().__init__()
        self._sources, self._advance = sources, advance
        self._last: Tensor | None = None

    def create_local_plan(self) -> SavePlan:
        """Large tensors as several parts."""
        plan = super().create_local_plan()
        parts = [part for item in plan.items for part in _parts_of_item(item, self._sources.get(item.index.fqn))]
        self.plan = replace(plan, items=parts)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The values of one part."""
        source = self._sources.get(write_item.index.fqn)
        if source is None:
            return super().resolve_data(write_item)
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        if self._last is not None:
            # torch's writer keeps every tensor of a file until it is complete
            self._last.untyped_storage().resize_(0)
        begin = chunk.offsets[0] if chunk.offsets else 0
        self._last = source.read_some(begin, begin + chunk.sizes[0] if chunk.sizes else 1).contiguous()
        if self._last.untyped_storage().nbytes() != self._last.nbytes or not self._last.untyped_storage().resizable():
            self._last = self._last.clone()
        self._advance(self._last.nbytes)
        return self._last


def _parts_of_item(item: WriteItem, source: LazyTensor | None) -> list[WriteItem]:
    data = item.tensor_data
    if source is None:
        return [item]
    assert data is not None
    if source.nbytes <= _PART or not source.ndim:
        return [item]
    parts = []
    for begin, end in source.rows(_PART):
        offsets, sizes = torch.Size([begin, *[0] * (source.ndim - 1)]), torch.Size([end - begin, *source.shape[1:]])
        chunk = ChunkStorageMetadata(offsets=offsets, sizes=sizes)
        index = MetadataIndex(item.index.fqn, offsets)
        parts.append(replace(item, index=index, type=WriteItemType.SHARD, tensor_data=replace(data, chunk=chunk)))
    return parts
