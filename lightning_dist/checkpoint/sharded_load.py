"""A directory of shards, read: every rank reads what it needs, in any layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from lightning_dist.checkpoint.checksums import UNRELATED
from lightning_dist.checkpoint.directory import Directory
from lightning_dist.checkpoint.formats import DamagedCheckpoint
from lightning_dist.checkpoint.lazy_tensors import OnDisk
from lightning_dist.checkpoint.sharded_save import checkpointable
from lightning_dist.checkpoint.storage import file_system
from lightning_dist.collectives import raise_on_all_ranks
from lightning_dist.dtensors import empty_like_layout, on_tensor_axis
from lightning_dist.placeholder import is_placeholder, placeholder
from lightning_dist.pytree import Path as TreePath


def read_sharded(
    path: Path,
    weights: Mapping[str, Any],
    parameters: Mapping[str, Any],
    optimizers: bool,
    weights_only: bool | None,
) -> dict[str, Any]:
    """Reads a directory of ours, or of Lightning's FSDP and ModelParallel strategies, into any layout.

    Args:
        path: the directory.
        weights: by the names of the state dict, tensors whose layout says which part of theirs this rank reads. Where
            there is none, or one of another shape, tensors are read whole, into host memory.
        parameters: by name, the same for the optimizer states of each.
        optimizers: read the optimizer states too.
        weights_only: as in ``torch.load``, for what is no tensor.

    Returns:
        Lightning's dictionary, its tensors DTensors in the layout of ``weights`` or plain; optimizer states by
        name.

    Raises:
        ValueError: on every rank, what :meth:`Directory.open` raises on any.
    """
    directory, wanted = _open(path, optimizers, weights_only)
    targets = _targets(directory.index, dict(wanted), weights, parameters)
    with raise_on_all_ranks(f"read checkpoint {path}"):
        read_into_targets(path, targets, directory.index, weights_only)
    return directory.joined((place, targets[key]) for key, place in wanted)


def open_sharded(path: Path, optimizers: bool, weights_only: bool | None) -> dict[str, Any]:
    """As :func:`read_sharded`, for a module that is not divided yet: weights and optimizer states are read when they
    are loaded, or looked at.

    Returns:
        Lightning's dictionary, in which these are :class:`~lightning_dist.checkpoint.lazy_tensors.OnDisk`.
    """
    directory, wanted = _open(path, optimizers, weights_only)
    reader, lazy = _Reader(directory), dict[str, Any]()
    for key, place in wanted:
        stored = directory.index.state_dict_metadata[key]
        if isinstance(stored, TensorStorageMetadata) and place[0] in ("state_dict", "optimizer_states"):
            lazy.setdefault(key, OnDisk(reader, key, stored.size, stored.properties.dtype))
    now = _targets(directory.index, {key: place for key, place in wanted if key not in lazy}, {}, {})
    with raise_on_all_ranks(f"read checkpoint {path}"):
        read_into_targets(path, now, directory.index, weights_only)
    return directory.joined((place, lazy[key] if key in lazy else now[key]) for key, place in wanted)


def _open(path: Path, optimizers: bool, weights_only: bool | None) -> tuple[Directory, list[tuple[str, TreePath]]]:
    """The directory, and where in the checkpoint the tensors belong that are wanted of it."""
    with raise_on_all_ranks(f"read checkpoint {path}"):
        directory = Directory.open(path, weights_only)
    if optimizers:
        return directory, directory.places
    directory.rest.pop("optimizer_states", None)
    return directory, [(key, place) for key, place in directory.places if place[0] != "optimizer_states"]


def _targets(
    index: Metadata, places: Mapping[str, TreePath], weights: Mapping[str, Any], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """Memory for what this rank reads; ``None`` for what is no tensor."""
    targets: dict[str, Any] = {}
    for key, place in places.items():
        stored = index.state_dict_metadata[key]
        if not isinstance(stored, TensorStorageMetadata):
            targets[key] = None
            continue
        like = weights.get(place[1]) if place[0] == "state_dict" else None
        if place[0] == "optimizer_states" and len(place) > 3:
            like = parameters.get(place[3])
        targets[key] = _memory_for(stored, like)
    return targets


def _memory_for(stored: TensorStorageMetadata, like: Any) -> Tensor:
    """For what a rank reads of a tensor that is loaded into another one."""
    size, dtype = stored.size, stored.properties.dtype
    if is_placeholder(like):  # another stage reads it
        return placeholder(torch.empty(size, dtype=dtype, device="meta"), torch.device("cpu"))
    return empty_like_layout(size, dtype, like if isinstance(like, Tensor) else None)


class _Reader:
    """The tensors of an open directory, read when they are asked for."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def whole(self, key: str) -> Tensor:
        targets = self._memory([(key, None)])
        self._read(targets)
        return targets[key]

    def in_layout(self, likes: dict[str, Tensor]) -> dict[str, Tensor]:
        targets = self._memory(likes.items())
        with raise_on_all_ranks(f"read checkpoint {self._directory.path}"):
            self._read(targets)
        return targets

    def _memory(self, likes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        stored: Mapping[str, Any] = self._directory.index.state_dict_metadata
        return {key: _memory_for(stored[key], like) for key, like in likes}

    def _read(self, targets: dict[str, Any]) -> None:
        read_into_targets(self._directory.path, targets, self._directory.index, True)


def read_into_targets(path: Path, targets: dict[str, Any], index: Metadata, weights_only: bool | None) -> None:
    """Fills tensors in place from a directory; placeholders stay, and ``None`` becomes what is no tensor.

    Each rank reads for itself: nothing is communicated.

    Raises:
        DamagedCheckpoint: the files hold something else.
    """
    held = {key: target for key, target in sorted(targets.items()) if not is_placeholder(target)}
    memory = {key: checkpointable(target) if on_tensor_axis(target) else target for key, target in held.items()}
    reader, planner = _IndexedReader(path), _FlatPlanner(weights_only)
    try:
        # the steps of dcp.load in one process, which warns then: a filter of warnings would hold for all threads
        planner.set_up_planner(memory, index, is_coordinator=True)
        reader.set_up_storage_reader(index, True)
        local_plan = reader.prepare_local_plan(planner.create_local_plan())
        plan = reader.prepare_global_plan(planner.create_global_plan([local_plan]))[0]
        reader.read_data(planner.finish_plan(plan), planner).wait()
    except UNRELATED:
        raise
    except Exception as error:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from error
    targets.update({key: memory[key] for key, target in targets.items() if target is None})


class _IndexedReader(dcp.FileSystemReader):
    """DCP's reader of files on the local disk or at a URL, for an index that was read and checked."""

    def __init__(self, path: Path) -> None:
        super().__init__("")
        self.fs, self.path = file_system(path), path


class _FlatPlanner(DefaultLoadPlanner):
    """Loads by key; what is no tensor (Lightning's directories have such entries) as ``torch.load`` would."""

    def __init__(self, weights_only: bool | None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._weights_only = weights_only

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=self._weights_only)
