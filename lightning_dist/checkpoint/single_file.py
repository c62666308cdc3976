"""Lightning's single file: the plain model's whole tensors, gathered and written by rank 0, mapped by all."""

from __future__ import annotations

import re
import typing
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_dist.checkpoint import locations
from lightning_dist.checkpoint.checksums import UNRELATED, validate_uncompressed, verify_file
from lightning_dist.checkpoint.lazy_tensors import leaves
from lightning_dist.checkpoint.locations import DamagedCheckpoint, flush, is_remote
from lightning_dist.checkpoint.optimizer_state import with_indices
from lightning_dist.checkpoint.weights import bare
from lightning_dist.collectives import gather_objects, global_rank, num_ranks, raise_on_all_ranks
from lightning_dist.dtensors import full_on_host
from lightning_dist.placeholder import is_placeholder, placeholder
from lightning_dist.pytree import Path as TreePath
from lightning_dist.pytree import map_leaves

_ZIP_MAGIC, _SMALL = b"PK\x03\x04", 1 << 24


def gather_state(checkpoint: Mapping[str, Any], stages: StageRanks | None = None) -> dict[str, Any]:
    """The checkpoint as plain Lightning in one process would hold it: full CPU tensors, optimizer states by index.

    Every rank calls this. Each DTensor costs what :func:`full_on_host` does, one after the other, so that a device
    holds one full tensor at a time, or some rows of a large one; rank 0 keeps them all, in host memory. Under ``pp``
    one rank of each stage keeps its own, and sends them: one all-gather of flags over the pipeline, as an object, and a
    send of each tensor that the first rank lacks, by the first that holds it.

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
            gathered[id(value)] = full_on_host(value, keeps)
        return gathered[id(value)]

    whole_checkpoint = map_leaves(dict(checkpoint), gather)
    if not keeps:
        return {}
    if stages is not None:
        whole_checkpoint = _from_stages(whole_checkpoint, stages)
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
    """Writes a checkpoint to one file, in which plain Lightning resumes; it has its name when it is complete.

    Args:
        whole: the checkpoint on rank 0, as :func:`gather_state` gives it.
        write: writes the gathered checkpoint in place of ``torch.save``, on rank 0.
        group: of all ranks, for a thread that communicates beside others. Default: the world.
    """
    with raise_on_all_ranks(f"write checkpoint {path}", group):
        if global_rank() == 0 and write is not None:
            write(whole, path)
        elif global_rank() == 0:
            locations.validate_target(path)
            with (
                locations.upload_on_exit(path) as local,
                locations.written_beside(local) as temporary,
                temporary.open("wb") as file,
            ):
                torch.save(whole, file)
                flush(file)


def read_single(path: Path, weights_only: bool | None) -> dict[str, Any]:
    """A checkpoint file of ours or of plain Lightning, or bare weights. Weights and optimizer states are mapped, not
    read. A ValueError for no checkpoint file, a damaged one, or one without weights.
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
    """What a file holds as Lightning's dictionary, bare weights as a ``state_dict``; a ValueError without either."""
    if isinstance(stored, dict) and "state_dict" in stored and isinstance(stored["state_dict"], Mapping):
        return stored
    weights = bare(stored)
    if weights is None:
        raise ValueError(
            f"{path} is no checkpoint of Lightning: it holds {_summary(stored)}, no 'state_dict' and no bare weights"
        )
    return {"state_dict": weights}


def check_sizes(stored: Any, path: Path) -> None:
    """Raises DamagedCheckpoint for a tensor of much more memory than its file has bytes: one that repeats a value."""
    limit = max(path.stat().st_size, _SMALL)
    for place, value in leaves(stored):
        if isinstance(value, Tensor) and value.numel() * value.element_size() > limit:
            raise DamagedCheckpoint(
                f"{path} is refused: {'.'.join(map(str, place))!r} has shape {tuple(value.shape)}, "
                f"{value.numel() * value.element_size():,} bytes, in a file of {path.stat().st_size:,}"
            )


def load_pickled(path: Path, weights_only: bool | None, mmap: bool = False) -> Any:
    """``torch.load`` on the CPU, with its semantics of ``weights_only``: ``None`` executes nothing from the file.
    Unlike there, ``None`` and ``True`` admit omegaconf's containers, in which Hydra's users keep their
    hyper-parameters. A ValueError for what can't be read, or holds what ``weights_only`` refuses.
    """
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    if is_zip:
        validate_uncompressed(path)
    opened: Any = path.open("rb") if is_remote(path) else nullcontext(path)
    try:
        with _safe_containers() if weights_only is not False else nullcontext(), opened as source:
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
        what = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DamagedCheckpoint(f"{path} is no checkpoint, or a damaged one: {what[:200]}") from error


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


def _summary(value: Any) -> str:
    if not isinstance(value, dict):
        return f"a {type(value).__name__}"
    keys = ", ".join(repr(key) for key in list(value)[:4])
    return f"a dictionary of {keys}{', ...' if len(value) > 4 else ''}" if value else "an empty dictionary"


@dataclass(frozen=True)
class StageRanks:
    """Where this rank stands among those that hold the stages: in which pipeline's group, on the device of its backend,
    and whether this rank, of all that hold the same stages, writes what each of them holds whole.
    """

    group: dist.ProcessGroup
    writes: bool
    device: torch.device


def with_other_stages(checkpoint: Mapping[str, Any], ranks: StageRanks) -> dict[str, Any]:
    """The checkpoint with the optimizer states of all stages, those of others as placeholders: an optimizer has a state
    for what it stepped over, so each rank has others; then all have the same entries in the same order. Numbers and
    scalars come with their values.

    Communication over the pipeline: one all-gather of the states' names, shapes and scalars, as an object.
    """
    states = checkpoint.get("optimizer_states")
    if not states:
        return dict(checkpoint)
    mine = [map_leaves(state.get("state", {}), _described) for state in states]
    everyone = gather_objects(mine, ranks.group)
    whole = [_completed(state, [part[number] for part in everyone]) for number, state in enumerate(states)]
    return {**checkpoint, "optimizer_states": whole}


def _completed(state: dict[str, Any], parts: list[dict[Any, Any]]) -> dict[str, Any]:
    """One optimizer's state with the entries of all stages, in the order of its parameters."""
    if "param_groups" not in state:
        return state
    merged: dict[Any, Any] = {}
    for part in parts:
        for name, value in part.items():
            merged.setdefault(name, value)
    own = state["state"]
    in_order = [name for group in state["param_groups"] for name in group["params"]]
    names = [*(name for name in in_order if name in merged), *(name for name in merged if name not in in_order)]
    whole = {name: own[name] if name in own else map_leaves(merged[name], _as_placeholder) for name in names}
    return {**state, "state": whole}


def _from_stages(checkpoint: Mapping[str, Any], ranks: StageRanks) -> dict[str, Any]:
    """The checkpoint with the tensors of all stages, on the first rank of the pipeline, in host memory."""
    flags = [not is_placeholder(value) for _, value in leaves(dict(checkpoint)) if isinstance(value, Tensor)]
    here = dist.get_rank(ranks.group)
    everyone = gather_objects(flags, ranks.group)
    sources = iter([next((rank for rank, held in enumerate(at) if held), 0) for at in zip(*everyone, strict=True)])
    received: dict[int, Tensor] = {}

    def bring(_: TreePath, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        source = next(sources)
        if source == 0 or (here != 0 and here != source):
            return value
        if here == source:
            dist.send(value.detach().to(ranks.device).contiguous(), group=ranks.group, group_dst=0)
            return value
        memory = torch.empty(value.shape, dtype=value.dtype, device=ranks.device)
        dist.recv(memory, group=ranks.group, group_src=source)
        return received.setdefault(id(value), memory.cpu())  # a tied parameter is one object

    return map_leaves(dict(checkpoint), bring)


def _described(_: TreePath, value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _as_placeholder(_: TreePath, value: Any) -> Any:
    return placeholder(value, torch.device("cpu")) if isinstance(value, Tensor) and value.is_meta else value
