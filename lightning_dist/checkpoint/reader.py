"""A checkpoint of any format, open: all of it is here but its tensors, which are read one at a time.

A single file of ``torch.save`` is a zip of stored records: one pickle, and one record a storage. torch says where each
begins, so that its bytes can be read alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from lightning_dist.checkpoint.checksums import verify_file
from lightning_dist.checkpoint.directory import Directory
from lightning_dist.checkpoint.formats import SAFETENSORS, DamagedCheckpoint, format_of, weight_files
from lightning_dist.checkpoint.lazy_tensors import PIECE, LazyTensor, read_into
from lightning_dist.checkpoint.safetensors import read_safetensors, rows_of_safetensors
from lightning_dist.checkpoint.single_file import as_checkpoint, check_sizes, load_pickled
from lightning_dist.compat.distributed import part_of_file
from lightning_dist.compat.torch import FakeTensorMode, place_in_file
from lightning_dist.pytree import Path as TreePath
from lightning_dist.pytree import map_leaves


def open_checkpoint(path: Path, weights_only: bool | None = None) -> dict[str, Any]:
    """Lightning's dictionary with a :class:`~lightning_dist.checkpoint.lazy_tensors.LazyTensor` for each tensor.

    Runs in one process, without a process group. Checksums are compared first.

    Args:
        path: a file or directory of ours, of plain Lightning or its strategies, or of bare weights; those come as a
            dictionary that has a ``state_dict`` only.
        weights_only: as in ``torch.load``.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no checkpoint, a damaged or incomplete one, or one that needs ``weights_only=False``.
    """
    format = format_of(path)
    if format == "sharded":
        return _open_directory(Directory.open(path, weights_only), weights_only)
    if format == "single":
        return as_checkpoint(_open_file(path, weights_only), path)
    weights: dict[str, Any] = {}
    for file in [path] if path.is_file() else weight_files(path):
        weights |= _open_weights(file, weights_only)
    return {"state_dict": weights}


def _open_file(path: Path, weights_only: bool | None) -> Any:
    verify_file(path, 0, 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stored = load_pickled(path, weights_only)
    check_sizes(stored, path)
    lazy = with_lazy_tensors(stored, path)
    return load_pickled(path, weights_only) if lazy is None else lazy


def with_lazy_tensors(tree: Any, path: Path) -> Any | None:
    """What ``torch.load`` gave under a ``FakeTensorMode``, with lazy tensors; None if it does not say where they are.

    Args:
        tree: nested containers.
        path: the file.
    """
    made: dict[_Stored, LazyTensor] = {}
    is_whole = True

    def make(_: TreePath, value: Any) -> Any:
        nonlocal is_whole
        if not isinstance(value, Tensor):
            return value
        begin = place_of_storage(value)
        if begin is None:
            is_whole = False
            return value
        shape, stride = tuple(value.shape), tuple(value.stride())
        stored = _Stored(path, begin, int(value.storage_offset()), shape, stride, value.dtype)
        if stored not in made:
            rows = stored.read_rows if stored.has_rows_in_order else None
            made[stored] = LazyTensor(value.shape, value.dtype, stored.read, rows)
        return made[stored]

    lazy = map_leaves(tree, make)
    return lazy if is_whole else None


def place_of_storage(fake: Tensor) -> int | None:
    """Where in the file the storage of a tensor begins, that was loaded under a ``FakeTensorMode``."""
    return place_in_file(fake) if fake.layout == torch.strided else None


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in a file of ``torch.save``.

    Args:
        path: the file.
        begin: of its storage, in bytes.
        offset: in the storage, in values.
        shape: of the tensor.
        stride: in values.
        dtype: of the tensor.
    """

    path: Path
    begin: int
    offset: int
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
            file.seek(self.begin + self.offset * self.dtype.itemsize)
            read_into(file, memory)
        return memory.as_strided(self.shape, self.stride)

    def read_rows(self, first: int, last: int) -> Tensor:
        offset = self.offset + first * self.stride[0]
        return replace(self, offset=offset, shape=(last - first, *self.shape[1:])).read()


def _length(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many values there are from the first to the last."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _open_weights(file: Path, weights_only: bool | None) -> dict[str, Any]:
    if file.suffix != SAFETENSORS:
        return dict(as_checkpoint(_open_file(file, weights_only), file)["state_dict"])
    made: dict[int, LazyTensor] = {}
    mapped = read_safetensors(file)
    for name, tensor in mapped.items():
        rows = partial(rows_of_safetensors, file, name) if tensor.ndim else None
        made.setdefault(id(tensor), LazyTensor(tensor.shape, tensor.dtype, partial(_mapped, file, name), rows))
    return {name: made[id(tensor)] for name, tensor in mapped.items()}


def _mapped(file: Path, name: str) -> Tensor:
    """Mapped anew each time, so that no pages stay."""
    return read_safetensors(file)[name]


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
        skipped = 0
        if shape:
            skipped = max(0, first - begins[0])
            begins[0], ends[0] = max(0, begins[0] - first), min(shape[0], ends[0] - first)
        target = rows
        if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
            continue
        for dim, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            target = target.narrow(dim, begin, end - begin)
        _read_part(directory, where, sizes[offsets], skipped, target)
    return rows


def _read_part(directory: Directory, where: MetadataIndex, size: torch.Size, skipped: int, target: Tensor) -> None:
    """Fills the target with a part, or with some of its rows.

    Args:
        directory: that has it.
        where: the part is.
        size: the shape of the part.
        skipped: rows of it before those of the target.
        target: to fill.
    """
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
        begin = place_of_storage(fake)
        if begin is None or not fake.is_contiguous():
            view.seek(0)
            part = torch.load(view, weights_only=True)
            target.copy_(part.narrow(0, skipped, len(target)) if part.ndim else part)
            return
        before = fake.storage_offset() + (skipped * fake.stride(0) if skipped else 0)
        file.seek(info.offset + begin + before * fake.dtype.itemsize)
        _fill(target, file)


def _fill(target: Tensor, file: IO[bytes]) -> None:
    """Fills a tensor from where the file stands; beside one that is not contiguous there is a piece in memory."""
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
