"""A snapshot, read: the parts of its ranks, put together for the ranks that go on."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_dist.checkpoint.locations import SNAPSHOT
from lightning_dist.checkpoint.slots import Part, read_part
from lightning_dist.checkpoint.snapshot_state import Reference, Row
from lightning_dist.collectives import global_rank
from lightning_dist.elastic.attempt import Attempt
from lightning_dist.pytree import Path as TreePath
from lightning_dist.pytree import map_leaves

SNAPSHOTS = "snapshots"
"""The folder for snapshots in the directory of an attempt."""

PART = ".part"


@dataclass(frozen=True)
class Info:
    """How parts go together.

    Args:
        is_same: the ranks that go on are as those that wrote; each takes what it had itself, as it had it. Else there
            are the parts of all of them.
        added: entries for Lightning's dictionary that are made of those of all ranks.
    """

    is_same: bool
    added: dict[str, Any]


def is_snapshot(path: Path) -> bool:
    """Whether a directory holds a snapshot's parts."""
    return isinstance(path, Path) and (path / SNAPSHOT).is_file()


def on_this_node(path: Path) -> Path:
    """A snapshot's directory as this node has it, where rank 0 named its own; any other path as it is."""
    attempt = Attempt.current()
    if attempt is None or path.parent.name != SNAPSHOTS:
        return path
    return attempt.directory / SNAPSHOTS / path.name


def read_snapshot(path: Path) -> tuple[dict[str, Any], Metadata, list[tuple[str, TreePath]]]:
    """What a snapshot holds beside its tensors, their index, whose storage are the mapped tensors themselves, and where
    in the checkpoint they belong. Nothing is communicated.
    """
    info: Info = pickle.loads((path / SNAPSHOT).read_bytes())
    parts = sorted((read_part(file) for file in path.glob(f"*{PART}")), key=lambda part: part.header.rank)
    if info.is_same:
        parts.sort(key=lambda part: part.header.rank != global_rank())  # this rank's own first
    index = Metadata({}, storage_data={})
    for is_stale in (False, True):  # what a stage changes comes before what others have of it
        for part in parts:
            _add(part, index, is_stale)
    if not info.is_same:
        _average(parts, index)
    taken = parts[:1] if info.is_same else parts
    places = dict.fromkeys((key, place) for part in taken for key, place in part.table[1])
    return {**_rest(taken), **info.added}, index, list(places)


def buffers_of_this_rank(path: Path) -> dict[str, Tensor] | None:
    """Buffers and parameters that are plain tensors as this rank had them, by name; None where other ranks go on."""
    if not pickle.loads((path / SNAPSHOT).read_bytes()).is_same:
        return None
    part = read_part(path / f"{global_rank()}{PART}")
    rows = {row.key: row for row in part.table[0] if row.shape is not None and row.shape == row.size}
    places = [(key, place) for key, place in part.table[1] if place[0] == "state_dict" and key in rows]
    return {place[1]: _tensor(part, rows[key]) for key, place in places}


def _add(part: Part, index: Metadata, is_stale: bool) -> None:
    """Notes a part's tensors; of what several ranks wrote, the first."""
    for row in part.table[0]:
        stored: Any = index.state_dict_metadata.setdefault(
            row.key, TensorStorageMetadata(TensorProperties(dtype=row.dtype), torch.Size(row.size), [])
        )
        if row.shape is None or row.is_stale != is_stale:
            continue
        local = _tensor(part, row)
        for start, place, size in row.blocks:
            where = MetadataIndex(row.key, torch.Size(place))
            if where not in index.storage_data:
                stored.chunks.append(ChunkStorageMetadata(torch.Size(place), torch.Size(size)))
                block = local[tuple(slice(begin, begin + count) for begin, count in zip(start, size, strict=True))]
                index.storage_data[where] = block


def _tensor(part: Part, row: Row) -> Tensor:
    assert row.shape is not None
    count = math.prod(row.shape)
    content = part.memory[row.offset : row.offset + count * row.dtype.itemsize]
    return content.view(row.dtype).view(row.shape) if count else torch.empty(row.shape, dtype=row.dtype)


def _average(parts: list[Part], index: Metadata) -> None:
    """What each rank has of its own samples, as a checkpoint has it: the mean."""
    by_key: dict[str, list[Tensor]] = {}
    for part in parts:
        for row in part.table[0]:
            if row.is_mean and not row.is_stale and row.shape is not None:
                by_key.setdefault(row.key, []).append(_tensor(part, row))
    for key, tensors in by_key.items():
        where = MetadataIndex(key, torch.Size([0] * tensors[0].ndim))
        index.storage_data[where] = torch.stack(tensors).mean(0)


def _rest(parts: list[Part]) -> dict[str, Any]:
    """The first rank's, with what only other stages of a pipeline had of their optimizers."""
    rest: dict[str, Any] = _filled(parts[0].small["rest"], parts[0])
    for part in parts[1:]:
        others = _filled(part.small["rest"].get("optimizer_states", []), part)
        for state, other in zip(rest.get("optimizer_states", []), others, strict=False):
            for name, values in other.get("state", {}).items():
                state["state"].setdefault(name, values)
    return rest


def _filled(tree: Any, part: Part) -> Any:
    """A tree with copies of the tensors that were taken out of it."""
    rows = {row.key: row for row in part.table[0]}

    def fill(_: TreePath, value: Any) -> Any:
        return _tensor(part, rows[value.key]).clone() if isinstance(value, Reference) else value

    return map_leaves(tree, fill)
