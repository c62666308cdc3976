"""Weights as files of safetensors: read mapped, written one tensor at a time.

The package of that name reads them, and writes what is in memory. The format is its documentation's: the length of a
header as 8 bytes, the header as JSON, the tensors one behind the other (huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_dist.checkpoint.formats import SAFETENSORS, WEIGHTS, DamagedCheckpoint
from lightning_dist.checkpoint.lazy_tensors import LazyTensor
from lightning_dist.checkpoint.locations import written_beside
from lightning_dist.checkpoint.storage import flush

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors that are mapped, and read where they are used; names that were saved as one are one object.

    Raises:
        ValueError: the file can't be read.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tied = file.metadata() or {}
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{path} is no file of safetensors, or a damaged one: {error}") from error
    # safetensors.torch.save_model writes one of the names that share a tensor, and the others in the metadata
    return tensors | {name: tensors[kept] for name, kept in tied.items() if kept in tensors and name not in tensors}


def rows_of_safetensors(path: Path, name: str, begin: int, end: int) -> Tensor:
    """Some rows of one tensor of a file that :func:`read_safetensors` has read, mapped anew, so that no pages stay."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        rows: Tensor = file.get_slice((file.metadata() or {}).get(name, name))[begin:end]
        return rows


def write_file(
    weights: Mapping[str, LazyTensor],
    path: Path,
    advance: Callable[[int], None] = lambda count: None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one file, which appears under its name when it is complete and on the disk.

    Args:
        weights: by name. Of names that are one object the first is written, and the others go to the metadata, as by
            ``safetensors.torch.save_model``.
        path: of the file.
        advance: told how many bytes have been written since it was last told.
        metadata: strings to store beside them.

    Raises:
        ValueError: a type of values that the format does not have.
    """
    header, order = _header(weights, metadata or {})
    with written_beside(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            for data in weights[name].pieces():
                file.write(data)
                advance(len(data))
        flush(file)


def _header(weights: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The header's text, and the names in the order in which their tensors follow it."""
    header: dict[str, object] = {}
    first: dict[int, str] = {}
    notes = {"format": "pt", **metadata}
    for name, lazy in weights.items():
        if lazy.dtype not in _NAMES:
            raise ValueError(f"{name!r} has values of {lazy.dtype}, which safetensors does not have")
        if first.setdefault(id(lazy), name) != name:
            notes[name] = first[id(lazy)]
    end = 0
    # wide values first, so that each begins at a multiple of its width
    order = sorted(first.values(), key=lambda name: -weights[name].dtype.itemsize)
    for name in order:
        lazy = weights[name]
        offsets = [end, end + lazy.nbytes]
        header[name] = {"dtype": _NAMES[lazy.dtype], "shape": list(lazy.shape), "data_offsets": offsets}
        end += lazy.nbytes
    text = json.dumps({"__metadata__": notes, **header}, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), order


def write_folder(
    weights: Mapping[str, LazyTensor],
    folder: Path,
    advance: Callable[[int], None] = lambda count: None,
    largest: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes ``model.safetensors``, or where it would be too large, parts of it and their index, as transformers does.

    Args:
        weights: by name; names that are one object lie in one file.
        folder: that is there.
        advance: told how many bytes have been written since it was last told.
        largest: bytes of a file, if no tensor is larger.
        metadata: strings to store in each.
    """
    parts = _parts(weights, largest)
    if len(parts) == 1:
        write_file(parts[0], folder / WEIGHTS, advance, metadata)
        return
    stem = WEIGHTS.removesuffix(SAFETENSORS)
    names = [f"{stem}-{number:05}-of-{len(parts):05}{SAFETENSORS}" for number in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        write_file(part, folder / name, advance, metadata)
    # of names that are one object, the first
    names_written = set({id(lazy): name for name, lazy in reversed(list(weights.items()))}.values())
    where = {name: file for file, part in zip(names, parts, strict=True) for name in part if name in names_written}
    total = sum(weights[name].nbytes for name in names_written)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _parts(weights: Mapping[str, LazyTensor], largest: int) -> list[dict[str, LazyTensor]]:
    """The weights of each file, of at most so many bytes if no tensor is larger."""
    parts: list[dict[str, LazyTensor]] = [{}]
    part_of: dict[int, dict[str, LazyTensor]] = {}
    size = 0
    for name, lazy in weights.items():
        if id(lazy) not in part_of:
            if size and size + lazy.nbytes > largest:
                parts.append({})
                size = 0
            size += lazy.nbytes
        part_of.setdefault(id(lazy), parts[-1])[name] = lazy
    return parts
