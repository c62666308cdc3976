"""Save, load and remove: which form a checkpoint has, decided once for all ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch.nn import Module

from lightning_dist.checkpoint.agreement import from_rank_zero, global_rank, together
from lightning_dist.checkpoint.background import BackgroundSaves
from lightning_dist.checkpoint.checksums import DamagedCheckpoint
from lightning_dist.checkpoint.files import METADATA, REST, remove_any
from lightning_dist.checkpoint.sharded import Shards, read_sharded, save_sharded
from lightning_dist.checkpoint.single import gather_state, read_single, save_single
from lightning_dist.checkpoint.stages import StageRanks, with_other_stages


def save(
    checkpoint: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    sharded: bool,
    write: Callable[[dict[str, Any], Path], None] | None = None,
    stages: StageRanks | None = None,
    background: BackgroundSaves | None = None,
) -> None:
    """Writes Lightning's checkpoint dictionary. Every rank calls this; the path is rank 0's.

    The checkpoint appears under its name when it is complete, in place of one that was there: a crash at any
    moment leaves that one whole.

    Args:
        checkpoint: Lightning's dictionary, its ``state_dict`` from :func:`model_state`, its
            ``optimizer_states`` from :func:`optimizer_state_by_name`. DTensors may be anywhere in it, in what
            callbacks add too.
        path: a local path.
        sharded: a directory to which every rank writes its part, else the single file of plain Lightning.
        write: for the single file, what writes it on rank 0 (a ``CheckpointIO`` of the user's).
        stages: the ranks that hold the stages of the module; None without a pipeline.
        background: writes while the training goes on, once the checkpoint has been copied to host memory. Default:
            this returns when the checkpoint is written.

    Raises:
        OSError, RuntimeError: on every rank, if any can't write, or could not write the last one in the background.
    """
    path = Path(from_rank_zero(os.fspath(path)))
    if background is not None:
        background.wait()
    if stages is not None:
        checkpoint = with_other_stages(checkpoint, stages)
    if sharded:
        shards = Shards.of(checkpoint, global_rank() == 0 if stages is None else stages.writes)
        if background is None:
            save_sharded(shards, path)
        else:
            background.start(path, partial(save_sharded, shards.copied(background.memory), path))
        return
    whole = gather_state(checkpoint, stages)
    if background is None:
        save_single(whole, path, write)
    else:
        background.start(path, partial(save_single, background.memory.snapshot(whole), path, write))


def load(
    path: str | os.PathLike[str],
    module: Module | None = None,
    *,
    optimizers: bool = True,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint of either form, of ours or of plain Lightning. Every rank calls this; the path is
    rank 0's.

    Each rank reads what it holds of the tensors: a single file is mapped and read where it is used, of a
    directory only the parts that overlap with the rank's shards. What is large stays so until
    :func:`load_model_state` and :func:`load_optimizer_state` have used it; in between, hooks may rename or
    change entries as in plain Lightning.

    Args:
        path: a file, or a directory of shards.
        module: the bare LightningModule in its layout; without it, tensors are read whole.
        optimizers: read the optimizer states too; evaluation has no use for them.
        weights_only: as in ``torch.load``: ``None`` and ``True`` execute nothing from the file.

    Returns:
        Lightning's dictionary.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: on every rank: no checkpoint, a damaged or incomplete one, or one that needs
            ``weights_only=False``.
    """
    path = Path(from_rank_zero(os.fspath(path)))
    with together(f"read checkpoint {path}"):
        directory = is_sharded(path)
    if directory:
        return read_sharded(path, module, optimizers, weights_only)
    with together(f"read checkpoint {path}"):
        checkpoint = read_single(path, weights_only)
    if not optimizers:
        checkpoint.pop("optimizer_states", None)
    return checkpoint


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Whether the checkpoint is a directory of shards, rather than a file.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a directory that is no checkpoint, or an incomplete one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if not path.is_dir():
        return False
    has_rest, has_index = (path / REST).is_file(), (path / METADATA).is_file()
    if not has_rest and not has_index:
        raise ValueError(
            f"{path} is a directory, but no checkpoint: it has neither {REST} nor {METADATA}; "
            "pass a .ckpt file, or the directory of a sharded checkpoint itself"
        )
    if not has_rest or not has_index:
        lost = METADATA if has_rest else REST
        raise DamagedCheckpoint(f"checkpoint {path} is incomplete: it has no {lost}; its save did not finish")
    return True


def remove(path: str | os.PathLike[str]) -> None:
    """Removes a checkpoint of either form, if it is there; of a link, only the link. Rank 0 calls this.

    Raises:
        ValueError: a directory that is no checkpoint: it is left alone.
    """
    path = Path(path)
    if path.is_dir() and not path.is_symlink() and not (path / REST).is_file() and not (path / METADATA).is_file():
        raise ValueError(f"{path} is no checkpoint, so it is not removed")
    remove_any(path)
