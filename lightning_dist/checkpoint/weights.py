"""Bare weights: files and directories of transformers, timm, torchvision and safetensors, which hold no run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module

from lightning_dist.checkpoint.checksums import DamagedCheckpoint
from lightning_dist.checkpoint.lazy import LazyTensor
from lightning_dist.plans.pretrained import in_module_names, pretrained_models

SAFETENSORS = ".safetensors"

CONFIG = "config.json"

_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDICES = tuple(f"{name}.index.json" for name in _WHOLE)

_NESTED = ("state_dict", "model", "module")
"""Where timm and torchvision's reference scripts keep the weights of a training."""


def weight_files(path: Path) -> list[Path]:
    """The files of weights of a directory; empty where it has none.

    Raises:
        ValueError: an index that can't be read, names a file outside the directory, or one that is not there.
    """
    for name in _INDICES:
        if (path / name).is_file():
            return _indexed(path, path / name)
    found = [path / name for name in _WHOLE if (path / name).is_file()]
    return found[:1] or sorted(path.glob(f"*{SAFETENSORS}"))


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
    """Weights under a module's names, whose network is often one of its attributes: ``fc.weight`` as ``net.fc.weight``.

    Models of transformers have tables of their own for what a file calls things.

    Args:
        weights: by a file's names.
        module: the LightningModule.
        state: its state, by the names of the plain model.
    """
    models = pretrained_models(module)
    for name, model in models.items():
        prefix = f"{name}." if name else ""
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        named, merged = in_module_names(weights, model, own, _read)
        named |= {key: LazyTensor(own[key].shape, own[key].dtype, read) for key, read in merged.items()}
        if 2 * len(named.keys() & own.keys()) > len(own):
            return _with_tied({prefix + key: value for key, value in named.items()}, state)
    return _with_tied(fitted(weights, state), state)


def fitted(weights: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Weights with a prefix taken off their names, another put before them, or both, so that most fit; unchanged where
    they fit as they are.

    Args:
        weights: by a file's names.
        names: of the module.
    """
    known = set(names)
    best, most = dict(weights), len(known & weights.keys())
    taken_off = ["", *sorted({name[: name.index(".") + 1] for name in weights if "." in name})]
    for off in taken_off:
        short = {name.removeprefix(off): value for name, value in weights.items() if name.startswith(off)}
        put_before = {""} | {
            name[: -len(sample)] for sample in list(short)[:8] for name in known if name.endswith(f".{sample}")
        }
        for before in sorted(put_before, key=lambda prefix: (len(prefix), prefix)):
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


def _indexed(path: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [path / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{index} is no index of weights, or a damaged one ({error})") from error
    for file in files:
        if file.resolve().parent != path.resolve():
            raise ValueError(f"{index} refers to {file.name!r}, outside its directory; it is refused")
        if not file.is_file():
            raise DamagedCheckpoint(f"{path} is incomplete: its part {file.name} is missing")
    return files
