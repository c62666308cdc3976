"""Save and load: which format a checkpoint has, decided once for all ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch.nn import Module

from lightning_dist.checkpoint import locations
from lightning_dist.checkpoint.background import BackgroundSaves
from lightning_dist.checkpoint.locations import SAFETENSORS
from lightning_dist.checkpoint.module_state import model_state, parameter_names
from lightning_dist.checkpoint.sharded_load import open_sharded, read_sharded
from lightning_dist.checkpoint.sharded_save import Shards, save_sharded
from lightning_dist.checkpoint.single_file import StageRanks, gather_state, read_single, save_single, with_other_stages
from lightning_dist.checkpoint.snapshot_read import on_this_node
from lightning_dist.checkpoint.weights import for_module, read_safetensors
from lightning_dist.collectives import broadcast_object, global_rank, raise_on_all_ranks


def save(
    checkpoint: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    sharded: bool,
    write: Callable[[dict[str, Any], Path], None] | None = None,
    stages: StageRanks | None = None,
    background: BackgroundSaves | None = None,
    then: Callable[[], None] | None = None,
) -> None:
    """Writes Lightning's checkpoint dictionary. Every rank calls this; the path is rank 0's.

    The checkpoint appears under its name when it is complete, in place of one that was there: a crash at any moment
    leaves that one whole.

    Args:
        checkpoint: Lightning's dictionary, its ``state_dict`` from :func:`model_state`, its ``optimizer_states`` from
            :func:`optimizer_state_by_name`. DTensors may be anywhere in it, in what callbacks add too.
        path: local, or the URL of a filesystem that fsspec knows.
        sharded: a directory to which every rank writes its part, else the single file of plain Lightning.
        write: for the single file, what writes it on rank 0 (a ``CheckpointIO`` of the user's).
        stages: the ranks that hold the stages of the module; None without a pipeline.
        background: writes while the training goes on, once the checkpoint has been copied to host memory. Default: this
            returns when the checkpoint is written.
        then: called on every rank when the checkpoint is complete; in the background, in its thread.

    Raises:
        OSError, RuntimeError: on every rank, if any can't write, or could not write the last one in the background.
        ValueError: on every rank, if the path is a directory with other things than one checkpoint.
    """
    path = locations.as_path(broadcast_object(path))
    if background is not None:
        background.wait()
    if stages is not None:
        checkpoint = with_other_stages(checkpoint, stages)
    write_it: Callable[..., None]
    if sharded:
        shards = Shards.of(checkpoint, global_rank() == 0 if stages is None else stages.writes)
        write_it = partial(save_sharded, shards if background is None else shards.copied(background.memory), path)
    else:
        whole = gather_state(checkpoint, stages)
        if background is not None:
            whole = background.memory.snapshot(whole, of=dict(checkpoint))
        write_it = partial(save_single, whole, path, write)
    if background is None:
        _write(write_it, then)
    else:
        background.start(path, partial(_write, write_it, then))


def _write(write: Callable[..., None], then: Callable[[], None] | None, *group: Any) -> None:
    write(*group)
    if then is not None:
        then()


def load(
    path: str | os.PathLike[str],
    module: Module | None = None,
    *,
    optimizers: bool = True,
    weights_only: bool | None = None,
    when_used: bool = False,
) -> dict[str, Any]:
    """Reads a checkpoint of either format, of ours or of plain Lightning, or bare weights. Every rank calls this; the
    path is rank 0's.

    Each rank reads what it holds of the tensors: a single file is mapped and read where it is used, of a directory only
    the parts that overlap with the rank's shards. What is large stays so until :func:`load_model_state` and
    :func:`load_optimizer_state` have used it; in between, hooks may rename or change entries as in plain Lightning.

    Args:
        path: a file, or a directory of shards; or weights of transformers, timm, torchvision or safetensors.
        module: the bare LightningModule in its layout; without it, tensors are read whole. Bare weights get the names
            that it has for them.
        optimizers: read the optimizer states too; evaluation has no use for them.
        weights_only: as in ``torch.load``: ``None`` and ``True`` execute nothing from the file.
        when_used: the module is not in its layout yet, so weights and optimizer states of a directory are read when
            they are loaded into it, or looked at.

    Returns:
        Lightning's dictionary; of bare weights, one that has a ``state_dict`` only.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: on every rank: no checkpoint, a damaged or incomplete one, or one that needs ``weights_only=False``.
    """
    path = locations.as_path(broadcast_object(path))
    with raise_on_all_ranks(f"read checkpoint {path}"):
        path = locations.resolve_swap(on_this_node(path))
        format = locations.format_of(path)
    if format == "sharded":
        if when_used:
            return open_sharded(path, optimizers, weights_only)
        weights = {} if module is None else model_state(module)
        parameters = {} if module is None else {name: p for p, name in parameter_names(module).items()}
        return read_sharded(path, weights, parameters, optimizers, weights_only)
    with raise_on_all_ranks(f"read checkpoint {path}"), locations.local_copy(path) as local:
        checkpoint = read_single(local, weights_only) if format == "single" else {"state_dict": _read_weights(local)}
        if module is not None and holds_no_run(checkpoint):
            checkpoint["state_dict"] = for_module(checkpoint["state_dict"], module, model_state(module))
    if not optimizers:
        checkpoint.pop("optimizer_states", None)
    return checkpoint


def _read_weights(path: Path) -> dict[str, Any]:
    """The tensors of a file of safetensors, or of a directory, mapped."""
    weights: dict[str, Any] = {}
    for file in locations.weight_files(path):
        weights |= read_safetensors(file) if file.suffix == SAFETENSORS else read_single(file, True)["state_dict"]
    return weights


def holds_no_run(checkpoint: Mapping[str, Any]) -> bool:
    """Whether what was loaded is bare weights."""
    return checkpoint.keys() == {"state_dict"}


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Whether the checkpoint is a directory of shards; raises as :func:`~lightning_dist.checkpoint.locations.format_of`
    does.
    """
    return locations.format_of(locations.resolve_swap(locations.as_path(path))) == "sharded"
