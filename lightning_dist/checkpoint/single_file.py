"""Lightning's single file: the plain model's whole tensors, written by rank 0, mapped by all."""

from __future__ import annotations

import re
import typing
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_dist.checkpoint.checksums import UNRELATED, validate_uncompressed, verify_file
from lightning_dist.checkpoint.formats import DamagedCheckpoint
from lightning_dist.checkpoint.locations import is_remote, upload_on_exit, validate_target, written_beside
from lightning_dist.checkpoint.optimizer_state import with_indices
from lightning_dist.checkpoint.stages import StageRanks, from_stages
from lightning_dist.checkpoint.storage import flush
from lightning_dist.checkpoint.weight_names import bare
from lightning_dist.collectives import global_rank, num_ranks, raise_on_all_ranks
from lightning_dist.dtensors import full
from lightning_dist.pytree import Path as TreePath
from lightning_dist.pytree import map_leaves

_ZIP_MAGIC = b"PK\x03\x04"

_SMALL = 1 << 24


def gather_state(checkpoint: Mapping[str, Any], stages: StageRanks | None = None) -> dict[str, Any]:
    """The checkpoint as plain Lightning in one process would hold it: full CPU tensors, optimizer states by
    index.

    Every rank calls this. Each DTensor costs the all-gather of :func:`full`, one after the other, so that a
    rank holds one full tensor at a time; rank 0 keeps them all, in host memory. Under ``pp`` one rank of each stage
    keeps its own, and sends them: see :func:`~lightning_dist.checkpoint.stages.from_stages`.

    Args:
        checkpoint: Lightning's dictionary.
        stages: the ranks that hold the stages; None without a pipeline.

    Returns:
        The checkpoint on rank 0, an empty dictionary on the others.
    """
    keeps = global_rank() == 0 or (stages is not None and stages.writes)
    gathered: dict[int, Tensor] = {}

    def gather(_: TreePath, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        if id(value) not in gathered:  # a tied parameter is one object: gathered once, written once
            whole = full(value)
            gathered[id(value)] = whole.cpu() if keeps else torch.empty(0)
        return gathered[id(value)]

    whole_checkpoint = map_leaves(dict(checkpoint), gather)
    if not keeps:
        return {}
    if stages is not None:
        whole_checkpoint = from_stages(whole_checkpoint, stages)
        if global_rank() != 0:
            return {}
    if "optimizer_states" in whole_checkpoint:
        states = [with_indices(state) for state in whole_checkpoint["optimizer_states"]]
        return {**whole_checkpoint, "optimizer_states": states}
    return whole_checkpoint


def save_single(
    whole: dict[str, Any],
    path: Path,
    write: Callable[[dict[str, Any], Path], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Writes a checkpoint to one file, in which plain Lightning resumes.

    The file appears under its name when it is complete.

    Args:
        whole: the checkpoint on rank 0, as :func:`gather_state` gives it.
        path: the file.
        write: writes the gathered checkpoint in place of ``torch.save``, on rank 0.
        group: of all ranks, for a thread that communicates beside others. Default: the world.
    """
    with raise_on_all_ranks(f"write checkpoint {path}", group):
        if global_rank() == 0 and write is not None:
            write(whole, path)
        elif global_rank() == 0:
            validate_target(path)
            write_atomically(whole, path)


def write_atomically(checkpoint: dict[str, Any], path: Path) -> None:
    """``torch.save`` under a temporary name, flushed to the disk, then renamed; or then sent to its URL."""
    with upload_on_exit(path) as local, written_beside(local) as temporary, temporary.open("wb") as file:
        torch.save(checkpoint, file)
        flush(file)


def read_single(path: Path, weights_only: bool | None) -> dict[str, Any]:
    """A checkpoint file of ours or of plain Lightning, or bare weights. Weights and optimizer states are mapped, not
    read.

    Raises:
        ValueError: no checkpoint file, a damaged one, or one without weights.
    """
    verify_file(path, global_rank(), num_ranks())
    stored = load_pickled(path, weights_only, mmap=True)
    check_sizes(stored, path)
    checkpoint = as_checkpoint(stored, path)

    def unmap(path: TreePath, value: Any) -> Any:
        mapped = path and path[0] in ("state_dict", "optimizer_states")
        return value if mapped or not isinstance(value, Tensor) else value.clone()

    return map_leaves(checkpoint, unmap)


def as_checkpoint(stored: Any, path: Path) -> dict[str, Any]:
    """What a file holds as Lightning's dictionary: bare weights become one that has a ``state_dict`` only.

    Raises:
        ValueError: it holds no weights.
    """
    if isinstance(stored, dict) and "state_dict" in stored and isinstance(stored["state_dict"], Mapping):
        return stored
    weights = bare(stored)
    if weights is None:
        raise ValueError(
            f"{path} is no checkpoint of Lightning: it holds {_summary(stored)}, no 'state_dict' and no bare weights"
        )
    return {"state_dict": weights}


def check_sizes(stored: Any, path: Path) -> None:
    """No tensor needs much more memory than the file has bytes, as one may that repeats a value.

    Raises:
        ValueError: one does.
    """
    limit = max(path.stat().st_size, _SMALL)

    def check(place: TreePath, value: Any) -> Any:
        if isinstance(value, Tensor) and value.numel() * value.element_size() > limit:
            raise DamagedCheckpoint(
                f"{path} is refused: {'.'.join(map(str, place))!r} has shape {tuple(value.shape)}, "
                f"{value.numel() * value.element_size():,} bytes, in a file of {path.stat().st_size:,}"
            )
        return value

    map_leaves(stored, check)


def load_pickled(path: Path, weights_only: bool | None, mmap: bool = False) -> Any:
    """``torch.load`` on the CPU, with its semantics of ``weights_only``: ``None`` executes nothing from the
    file.

    Unlike ``torch.load``, ``None`` and ``True`` admit omegaconf's containers, in which Hydra's users keep
    their hyper-parameters.

    Raises:
        ValueError: what can't be read, or holds what ``weights_only`` refuses.
    """
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    if is_zip:
        validate_uncompressed(path)
    try:
        with _safe_containers() if weights_only is not False else nullcontext(), _source(path) as source:
            return torch.load(source, map_location="cpu", mmap=mmap and is_zip, weights_only=weights_only)
    except UNRELATED:
        raise
    except Exception as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if weights_only is not False and refused is not None:
            raise ValueError(
                f"checkpoint {path} holds a {refused[1]}, and loading one executes code from the file; "
                "if you trust the file, pass weights_only=False (to Trainer.fit, validate, test or predict)"
            ) from error
        raise DamagedCheckpoint(f"{path} is no checkpoint, or a damaged one: {_first_line(error)}") from error


def _source(path: Path) -> AbstractContextManager[Any]:
    return path.open("rb") if is_remote(path) else nullcontext(path)


def _safe_containers() -> AbstractContextManager[Any]:
    """Lets torch's restricted unpickler make omegaconf's containers, which hold data and run nothing."""
    try:
        from omegaconf import DictConfig, ListConfig, base, nodes
    except ImportError:
        return nullcontext()
    values = [kind for kind in vars(nodes).values() if isinstance(kind, type) and issubclass(kind, nodes.ValueNode)]
    plain = [typing.Any, defaultdict, dict, list, tuple, int, float, str, bool]
    return torch.serialization.safe_globals(
        [DictConfig, ListConfig, base.ContainerMetadata, base.Metadata, *values, *plain]
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _summary(value: Any) -> str:
    if isinstance(value, dict):
        keys = ", ".join(repr(key) for key in list(value)[:4])
        return f"a dictionary of {keys}{', ...' if len(value) > 4 else ''}" if value else "an empty dictionary"
    return f"a {type(value).__name__}"
