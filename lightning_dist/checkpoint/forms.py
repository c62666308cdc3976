"""Which form a checkpoint has."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning_dist.checkpoint.checksums import DamagedCheckpoint
from lightning_dist.checkpoint.files import METADATA, REST
from lightning_dist.checkpoint.weights import SAFETENSORS, weight_files

Form = Literal["single", "sharded", "weights"]


def form_of(path: Path) -> Form:
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
