"""Checkpoints in the memory of their largest tensor: opened with lazy tensors, and written one tensor at a time.

[Note: a file of ``torch.save``]
It is a zip of stored records: one pickle, and one record a storage. torch says where each record begins, so that its
bytes can be read alone, and writes a file with room for them, which are filled in one after the other.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from lightning_dist.checkpoint import locations
from lightning_dist.checkpoint.checksums import verify_file
from lightning_dist.checkpoint.lazy_tensors import PIECE, Advance, LazyTensor, bytes_of, leaves, read_into
from lightning_dist.checkpoint.locations import SAFETENSORS, DamagedCheckpoint
from lightning_dist.checkpoint.sharded_load import Directory
from lightning_dist.checkpoint.sharded_save import Shards, is_large, save_sharded
from lightning_dist.checkpoint.single_file import as_checkpoint, check_sizes, load_pickled
from lightning_dist.checkpoint.weights import read_safetensors, rows_of_safetensors
from lightning_dist.compat.distributed import part_of_file
from lightning_dist.compat.torch import FakeTensorMode, place_in_file
from lightning_dist.pytree import Path as TreePath
from lightning_dist.pytree import map_leaves

_PART = 1 << 25
"""Bytes of a part of a sharded checkpoint that is written by rows."""

_CENTRAL, _DESCRIPTOR = b"PK\x01\x02", b"PK\x07\x08"
"""What an entry of a zip's directory begins with, and what stands between a record and its checksum."""


def open_checkpoint(path: Path, weights_only: bool | None = None) -> dict[str, Any]:
    """Lightning's dictionary with a :class:`~lightning_dist.checkpoint.lazy_tensors.LazyTensor` for each tensor, in one
    process, without a process group. Checksums are compared first.

    Args:
        path: a file or directory of ours, of plain Lightning or its strategies, or of bare weights; those come as a
            dictionary that has a ``state_dict`` only.
        weights_only: as in ``torch.load``.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no checkpoint, a damaged or incomplete one, or one that needs ``weights_only=False``.
    """
    format = locations.format_of(path)
    if format == "sharded":
        return _open_directory(Directory.open(path, weights_only), weights_only)
    if format == "single":
        return as_checkpoint(_open_file(path, weights_only), path)
    weights: dict[str, Any] = {}
    for file in locations.weight_files(path):
        weights |= _open_weights(file, weights_only)
    return {"state_dict": weights}


def _open_file(path: Path, weights_only: bool | None) -> Any:
    verify_file(path, 0, 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stored = load_pickled(path, weights_only)
    check_sizes(stored, path)
    lazy = _with_lazy_tensors(stored, path)
    return load_pickled(path, weights_only) if lazy is None else lazy


def _with_lazy_tensors(tree: Any, path: Path) -> Any | None:
    """What ``torch.load`` gave under a ``FakeTensorMode``, lazy; None where it does not say where tensors lie."""
    if any(isinstance(value, Tensor) and _place_of_storage(value) is None for _, value in leaves(tree)):
        return None
    made: dict[_Stored, LazyTensor] = {}

    def make(_: TreePath, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        begin = (_place_of_storage(value) or 0) + int(value.storage_offset()) * value.dtype.itemsize
        stored = _Stored(path, begin, tuple(value.shape), tuple(value.stride()), value.dtype)
        if stored not in made:
            rows = stored.read_rows if stored.has_rows_in_order else None
            made[stored] = LazyTensor(value.shape, value.dtype, stored.read, rows)
        return made[stored]

    return map_leaves(tree, make)


def _place_of_storage(fake: Tensor) -> int | None:
    """Where in the file the storage begins of a tensor that was loaded under a ``FakeTensorMode``."""
    return place_in_file(fake) if fake.layout == torch.strided else None


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in a file of ``torch.save``: it begins at that byte, and its stride is in values."""

    path: Path
    begin: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def has_rows_in_order(self) -> bool:
        """Whether what lies between two rows in memory is little beside them."""
        return bool(self.shape) and self.stride[0] >= _length(self.shape[1:], self.stride[1:])

    def read(self) -> Tensor:
        memory = torch.empty(0 if 0 in self.shape else _length(self.shape, self.stride), dtype=self.dtype)
        with self.path.open("rb") as file:
            file.seek(self.begin)
            read_into(file, memory)
        return memory.as_strided(self.shape, self.stride)

    def read_rows(self, first: int, last: int) -> Tensor:
        begin = self.begin + first * self.stride[0] * self.dtype.itemsize
        return replace(self, begin=begin, shape=(last - first, *self.shape[1:])).read()


def _length(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many values there are from the first to the last."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _open_weights(file: Path, weights_only: bool | None) -> dict[str, Any]:
    if file.suffix != SAFETENSORS:
        return dict(as_checkpoint(_open_file(file, weights_only), file)["state_dict"])
    made: dict[int, LazyTensor] = {}
    mapped = read_safetensors(file)
    for name, tensor in mapped.items():
        whole, rows = partial(_mapped, file, name), partial(rows_of_safetensors, file, name) if tensor.ndim else None
        made.setdefault(id(tensor), LazyTensor(tensor.shape, tensor.dtype, whole, rows))
    return {name: made[id(tensor)] for name, tensor in mapped.items()}


def _mapped(file: Path, name: str) -> Tensor:
    return read_safetensors(file)[name]  # anew each time, so that no pages stay


def _open_directory(directory: Directory, weights_only: bool | None) -> dict[str, Any]:
    made: dict[str, Any] = {}
    parts: dict[str, list[MetadataIndex]] = {}
    for where in directory.index.storage_data:
        parts.setdefault(where.fqn, []).append(where)
    for key, _ in directory.places:
        stored = directory.index.state_dict_metadata[key]
        if isinstance(stored, TensorStorageMetadata):
            read = partial(_read_parts, directory, key, parts.get(key, []))
            rows = read if stored.size else None
            made.setdefault(key, LazyTensor(stored.size, stored.properties.dtype, read, rows))
        else:
            made.setdefault(key, _read_object(directory, parts[key][0], weights_only))
    return directory.joined((place, made[key]) for key, place in directory.places)


def _read_parts(
    directory: Directory, key: str, parts: list[MetadataIndex], first: int = 0, last: int | None = None
) -> Tensor:
    """Rows of a tensor from all its parts; beside them there is a small piece of one in memory."""
    stored: Any = directory.index.state_dict_metadata[key]
    shape = list(stored.size)
    if last is not None:
        shape[0] = last - first
    rows = torch.empty(shape, dtype=stored.properties.dtype)
    sizes = {chunk.offsets: chunk.sizes for chunk in stored.chunks}
    for where in parts:
        offsets = where.offset if where.offset is not None else stored.chunks[0].offsets
        begins, ends = list(offsets), [begin + size for begin, size in zip(offsets, sizes[offsets], strict=True)]
        skipped = max(0, first - begins[0]) if shape else 0
        if shape:
            begins[0], ends[0] = max(0, begins[0] - first), min(shape[0], ends[0] - first)
        if all(begin < end for begin, end in zip(begins, ends, strict=True)):
            target = rows[tuple(map(slice, begins, ends))]
            _read_part(directory, where, sizes[offsets], skipped, target)
    return rows


def _read_part(directory: Directory, where: MetadataIndex, size: torch.Size, skipped: int, target: Tensor) -> None:
    """Fills the target with a part of that size, or with some of its rows, after those that are skipped."""
    info = directory.index.storage_data[where]
    with (directory.path / info.relative_path).open("rb") as file:
        view: Any = part_of_file(file, info.offset, info.length)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = torch.load(view, weights_only=True)
        if fake.shape != size or fake.dtype != target.dtype:
            raise DamagedCheckpoint(
                f"checkpoint {directory.path} is damaged: its part {info.relative_path} has {tuple(fake.shape)} of "
                f"{fake.dtype} where {tuple(size)} of {target.dtype} of {where.fqn!r} should be"
            )
        begin = _place_of_storage(fake)
        if begin is None or not fake.is_contiguous():
            view.seek(0)
            part = torch.load(view, weights_only=True)
            target.copy_(part.narrow(0, skipped, len(target)) if part.ndim else part)
            return
        before = fake.storage_offset() + (skipped * fake.stride(0) if skipped else 0)
        file.seek(info.offset + begin + before * fake.dtype.itemsize)
        _fill(target, file)


def _fill(target: Tensor, file: IO[bytes]) -> None:
    """Fills a tensor from where the file stands; of one that is not contiguous a piece at a time."""
    if target.is_contiguous():
        read_into(file, target)
        return
    row = max(1, target[0].numel() * target.element_size()) if target.ndim and len(target) else 1
    for rows in target.split(max(1, PIECE // row)):
        piece = torch.empty(rows.shape, dtype=rows.dtype)
        read_into(file, piece)
        rows.copy_(piece)


def _read_object(directory: Directory, where: MetadataIndex, weights_only: bool | None) -> Any:
    info = directory.index.storage_data[where]
    with (directory.path / info.relative_path).open("rb") as file:
        view: Any = part_of_file(file, info.offset, info.length)
        return torch.load(view, weights_only=weights_only)


def write_streaming_file(tree: dict[str, Any], path: Path, advance: Advance) -> None:
    """``torch.save`` of a tree whose tensors are lazy, or plain, one after the other: see [Note: a file of
    ``torch.save``]. The file appears under its name when it is complete and on the disk; it holds its checksums.
    """
    with locations.written_beside(path) as temporary:
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
            locations.flush(file)


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
    for place, value in leaves(written):
        begin = _place_of_storage(value) if isinstance(value, Tensor) else None
        if begin is not None:
            begins.setdefault(begin, sources[place])
    return begins


def _write_checksums(file: BinaryIO, records: list[zipfile.ZipInfo], central: int, checksums: dict[int, int]) -> None:
    """Writes those of records that were filled in, behind each and into the directory at the file's end."""
    entry = central
    for record in records:
        file.seek(record.header_offset)
        begin = record.header_offset + 30 + sum(struct.unpack("<HH", file.read(30)[26:]))
        file.seek(entry)
        header = file.read(46)
        assert header[:4] == _CENTRAL
        if begin in checksums and record.file_size:
            crc = struct.pack("<L", checksums[begin])
            file.seek(entry + 16)
            file.write(crc)
            file.seek(begin + record.file_size)
            is_behind = file.read(4) == _DESCRIPTOR
            file.seek(begin + record.file_size + 4 if is_behind else record.header_offset + 14)
            file.write(crc)
        entry += 46 + sum(struct.unpack("<HHH", header[28:34]))


def write_streaming_directory(checkpoint: dict[str, Any], path: Path, advance: Advance) -> None:
    """Writes a directory of shards, local or at a URL, by one process, of a tree whose tensors are lazy."""
    lazies: dict[TreePath, LazyTensor] = {}
    made: dict[tuple[int, bool], Tensor] = {}

    def take(place: TreePath, value: Any) -> Any:
        if not isinstance(value, LazyTensor):
            return value
        kind = id(value), is_large(place, value)
        if is_large(place, value):
            lazies[place] = value
            made.setdefault(kind, torch.empty(value.shape, dtype=value.dtype, device="meta"))
        elif kind not in made:
            made[kind] = value.read()
        return made[kind]

    shards = Shards.of(map_leaves(checkpoint, take), writes_plain=True)
    sources = {key: lazies[place] for key, place in shards.places if place in lazies}
    save_sharded(shards, path, planner=_LazyPlanner(sources, advance))


class _LazyPlanner(DefaultSavePlanner):
    """Reads a tensor when it is written, large ones by rows, and lets what was read before go."""

    def __init__(self, sources: Mapping[str, LazyTensor], advance: Advance) -> None:
        super().__init__()
        self._sources, self._advance = sources, advance
        self._last: Tensor | None = None

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        parts = [part for item in plan.items for part in _parts_of_item(item, self._sources.get(item.index.fqn))]
        self.plan = replace(plan, items=parts)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
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
    if source is None or source.nbytes <= _PART or not source.ndim:
        return [item]
    assert data is not None
    parts = []
    for begin, end in source.rows(_PART):
        offsets, sizes = torch.Size([begin, *[0] * (source.ndim - 1)]), torch.Size([end - begin, *source.shape[1:]])
        chunk = ChunkStorageMetadata(offsets=offsets, sizes=sizes)
        index = MetadataIndex(item.index.fqn, offsets)
        parts.append(replace(item, index=index, type=WriteItemType.SHARD, tensor_data=replace(data, chunk=chunk)))
    return parts
