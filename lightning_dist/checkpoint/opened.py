"""A checkpoint of any form, open: all of it is here but its tensors, which are read one at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

# Private in torch 2.14: a part of a file as a file, as torch's own reader makes it.
from torch.distributed.checkpoint.utils import _create_file_view

from lightning_dist.checkpoint.checksums import DamagedCheckpoint, verify_file
from lightning_dist.checkpoint.directory import Directory
from lightning_dist.checkpoint.filled import lazily, offset_of
from lightning_dist.checkpoint.forms import form_of
from lightning_dist.checkpoint.lazy import LazyTensor, read_into
from lightning_dist.checkpoint.single import as_checkpoint, check_sizes, load_pickled
from lightning_dist.checkpoint.weights import SAFETENSORS, read_safetensors, rows_of_safetensors, weight_files

_PIECE = 1 << 24


def open_checkpoint(path: Path, weights_only: bool | None = None) -> dict[str, Any]:
    """Lightning's dictionary with a :class:`~lightning_dist.checkpoint.lazy.LazyTensor` for each tensor.

    Runs in one process, without a process group. Checksums are compared first.

    Args:
        path: a file or directory of ours, of plain Lightning or its strategies, or of bare weights; those come as a
            dictionary that has a ``state_dict`` only.
        weights_only: as in ``torch.load``.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no checkpoint, a damaged or incomplete one, or one that needs ``weights_only=False``.
    """
    form = form_of(path)
    if form == "sharded":
        return _open_directory(Directory.open(path, weights_only), weights_only)
    if form == "single":
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
    lazy = lazily(stored, path)
    return load_pickled(path, weights_only) if lazy is None else lazy


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
        view: Any = _create_file_view(file, info.offset, info.length)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = torch.load(view, weights_only=True)
        if fake.shape != size or fake.dtype != target.dtype:
            raise DamagedCheckpoint(
                f"checkpoint {directory.path} is damaged: its part {info.relative_path} has {tuple(fake.shape)} of "
                f"{fake.dtype} where {tuple(size)} of {target.dtype} of {where.fqn!r} should be"
            )
        begin = offset_of(fake)
        if begin is None or not fake.is_contiguous():
            view.seek(0)
            part = torch.load(view, weights_only=True)
            target.copy_(part.narrow(0, skipped, len(target)) if part.ndim else part)
            return
        before = fake.storage_offset() + (skipped * fake.stride(0) if skipped else 0)
        file.seek(info.offset + begin + before * fake.dtype.itemsize)
        if target.is_contiguous():
            read_into(file, target)
            return
        row = max(1, target[0].numel() * target.element_size()) if target.ndim and len(target) else 1
        for rows in target.split(max(1, _PIECE // row)):
            piece = torch.empty(rows.shape, dtype=rows.dtype)
            read_into(file, piece)
            rows.copy_(piece)


def _read_object(directory: Directory, where: MetadataIndex, weights_only: bool | None) -> Any:
    info = directory.index.storage_data[where]
    with (directory.path / info.relative_path).open("rb") as file:
        view: Any = _create_file_view(file, info.offset, info.length)
        return torch.load(view, weights_only=weights_only)
