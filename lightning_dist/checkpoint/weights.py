"""Bare weights, which hold no run, as transformers, timm and torchvision save them: under the names of a module, and as
files of safetensors, read mapped and written one tensor at a time.

The package of that name reads them. The format is its documentation's: the length of a header as 8 bytes, the header as
JSON, the tensors one behind the other (huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning_dist.checkpoint.lazy_tensors import Advance, LazyTensor
from lightning_dist.checkpoint.locations import SAFETENSORS, WEIGHTS, DamagedCheckpoint, flush, written_beside
from lightning_dist.plans.pretrained import in_module_names, pretrained_models

_NESTED = ("state_dict", "model", "module")
"""Where timm and torchvision's reference scripts keep the weights of a training."""


def bare(stored: Any) -> Mapping[str, Any] | None:
    """The weights in what ``torch.load`` gave; None if it holds none."""
    if not isinstance(stored, Mapping):
        return None
    for name in _NESTED:
        if isinstance(stored.get(name), Mapping):
            stored = stored[name]
            break
    values = list(stored.values())
    is_bare = values and all(isinstance(name, str) for name in stored) and any(isinstance(v, Tensor) for v in values)
    return stored if is_bare and not any(isinstance(value, Mapping) for value in values) else None


def for_module(weights: Mapping[str, Any], module: Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of a file under a module's names, whose network is often one of its attributes: ``fc.weight`` as
    ``net.fc.weight``. Models of transformers have tables of their own for what a file calls things.

    Args:
        state: of the module, by the names of the plain model.
    """
    for name, model in pretrained_models(module).items():
        prefix = f"{name}." if name else ""
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        named, merged = in_module_names(weights, model, own, _read)
        named |= {key: LazyTensor(own[key].shape, own[key].dtype, read) for key, read in merged.items()}
        if 2 * len(named.keys() & own.keys()) > len(own):
            return _with_tied({prefix + key: value for key, value in named.items()}, state)
    return _with_tied(_fitted(weights, state), state)


def _fitted(weights: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Weights with a prefix taken off, another put before, or both, where more of the module's names fit then."""
    known = set(names)
    best, most = dict(weights), len(known & weights.keys())
    taken_off = ["", *sorted({name[: name.index(".") + 1] for name in weights if "." in name})]
    for off in taken_off:
        short = {name.removeprefix(off): value for name, value in weights.items() if name.startswith(off)}
        samples = list(short)[:8]
        put_before = {name[: -len(end)] for end in samples for name in known if name.endswith(f".{end}")}
        for before in sorted({"", *put_before}, key=lambda prefix: (len(prefix), prefix)):
            hits = sum(before + name in known for name in short)
            if hits > most:
                rest = {name: value for name, value in weights.items() if not name.startswith(off)}
                best, most = rest | {before + name: value for name, value in short.items()}, hits
    return best


def _with_tied(weights: dict[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Files hold a tied parameter once: the module's other names for it get the same."""
    known = {id(value): name for name, value in state.items() if name in weights}
    tied = {name: known[id(value)] for name, value in state.items() if name not in weights and id(value) in known}
    return weights | {name: weights[other] for name, other in tied.items()}


def _read(weight: Any) -> Tensor:
    return weight.read() if isinstance(weight, LazyTensor) else weight


_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Mapped tensors; names that were saved as one are one object. A ValueError where the file can't be read."""
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


def write_file(weights: Mapping[str, LazyTensor], path: Path, advance: Advance) -> None:
    """Writes one file, which appears under its name when it is complete and on the disk. Of names that are one object
    the first is written, and the others go to the metadata, as by ``safetensors.torch.save_model``. A ValueError for a
    type of values that the format does not have.
    """
    header, order = _header(weights)
    with written_beside(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            for data in weights[name].pieces():
                file.write(data)
                advance(len(data))
        flush(file)


def _header(weights: Mapping[str, LazyTensor]) -> tuple[bytes, list[str]]:
    """The header's text, and the names in the order in which their tensors follow it."""
    header: dict[str, object] = {}
    first: dict[int, str] = {}
    notes = {"format": "pt"}
    for name, lazy in weights.items():
        if lazy.dtype not in _NAMES:
            raise ValueError(
                f"{name!r} has values of {lazy.dtype}, which safetensors does not have; cast it before, or choose "
                "another form"
            )
        if first.setdefault(id(lazy), name) != name:
            notes[name] = first[id(lazy)]
    end = 0
    # wide values first, so that each begins at a multiple of its width
    order = sorted(first.values(), key=lambda name: -weights[name].dtype.itemsize)
    for name in order:
        lazy, begin = weights[name], end
        end += lazy.nbytes
        header[name] = {"dtype": _NAMES[lazy.dtype], "shape": list(lazy.shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": notes, **header}, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), order


def write_folder(weights: Mapping[str, LazyTensor], folder: Path, advance: Advance, largest: int) -> None:
    """Writes ``model.safetensors``, or where it would be too large, parts of it and their index, as transformers does:
    of at most so many bytes, if no tensor has more. Names that are one object lie in one file.
    """
    parts = _parts(weights, largest)
    if len(parts) == 1:
        write_file(parts[0], folder / WEIGHTS, advance)
        return
    stem = WEIGHTS.removesuffix(SAFETENSORS)
    names = [f"{stem}-{number:05}-of-{len(parts):05}{SAFETENSORS}" for number in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        write_file(part, folder / name, advance)
    # of names that are one object, the first
    names_written = set({id(lazy): name for name, lazy in reversed(list(weights.items()))}.values())
    where = {name: file for file, part in zip(names, parts, strict=True) for name in part if name in names_written}
    total = sum(weights[name].nbytes for name in names_written)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _parts(weights: Mapping[str, LazyTensor], largest: int) -> list[dict[str, LazyTensor]]:
    parts: list[dict[str, LazyTensor]] = [{}]
    part_of: dict[int, dict[str, LazyTensor]] = {}
    size = 0
    for name, lazy in weights.items():
        if id(lazy) not in part_of:
            if size and size + lazy.nbytes > largest:
                parts, size = [*parts, {}], 0
            size += lazy.nbytes
        part_of.setdefault(id(lazy), parts[-1])[name] = lazy
    return parts
