"""Which format a checkpoint has, told by the names of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from lightning_dist.collectives import raised_on_all_ranks

Format = Literal["single", "sharded", "weights"]

REST = "meta.pt"
"""What a sharded checkpoint holds beside its tensors; Lightning's strategies use the same name."""

METADATA = ".metadata"
"""The index of torch.distributed.checkpoint: which part of which tensor is where. Written last."""

CHECKSUMS = "checksums.json"
"""Size in bytes and CRC-32 of each file of a directory, by name."""

SAFETENSORS = ".safetensors"

CONFIG = "config.json"

WEIGHTS = "model.safetensors"

_WEIGHTS = (WEIGHTS, "pytorch_model.bin")
_INDICES = tuple(f"{name}.index.json" for name in _WEIGHTS)


@raised_on_all_ranks
class DamagedCheckpoint(ValueError):
    """A checkpoint that lacks a part, or whose bytes are not those that were written."""


def format_of(path: Path) -> Format:
    """``"single"``, a file of ``torch.save``; ``"sharded"``, a directory of shards; or ``"weights"``, a file of
    safetensors, or a directory of weights as transformers and timm write it.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a directory that is no checkpoint, or an incomplete one.
    """
    if not path.exists():
        raise FileNotFoundError(f"Checkpoint file not found: {path}")
    if not path.is_dir():
        return "weights" if path.suffix == SAFETENSORS else "single"
    has_rest, has_index = (path / REST).is_file(), (path / METADATA).is_file()
    if has_rest and has_index:
        return "sharded"
    if has_rest or has_index:
        lost = METADATA if has_rest else REST
        raise DamagedCheckpoint(f"checkpoint {path} is incomplete: it has no {lost}; its save did not finish")
    if weight_files(path):
        return "weights"
    raise ValueError(
        f"{path} is a directory, but no checkpoint: it has neither {REST} nor {METADATA}, nor weights such as "
        "model.safetensors; pass a .ckpt file, or the directory of a sharded checkpoint itself"
    )


def weight_files(path: Path) -> list[Path]:
    """The files of weights of a directory; empty where it has none.

    Raises:
        ValueError: an index that can't be read, names a file outside the directory, or one that is not there.
    """
    for name in _INDICES:
        if (path / name).is_file():
            return _indexed(path, path / name)
    found = [path / name for name in _WEIGHTS if (path / name).is_file()]
    return found[:1] or sorted(path.glob(f"*{SAFETENSORS}"))


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
