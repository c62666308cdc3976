"""A directory of shards, read: what it says of itself, checked, then what of its tensors this rank needs."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from lightning_dist.checkpoint.checksums import UNRELATED, ChecksumFileSystem, verify_directory
from lightning_dist.checkpoint.lazy_tensors import OnDisk
from lightning_dist.checkpoint.locations import CHECKSUMS, METADATA, REST, DamagedCheckpoint
from lightning_dist.checkpoint.sharded_save import FORMAT, MARKER, checkpointable, put_at
from lightning_dist.checkpoint.single_file import check_sizes, load_pickled
from lightning_dist.checkpoint.snapshot_read import is_snapshot, read_snapshot
from lightning_dist.collectives import global_rank, num_ranks, raise_on_all_ranks
from lightning_dist.compat.torch import CLASSES_OF_A_DCP_INDEX
from lightning_dist.dtensors import empty_like_layout, local_part, on_tensor_axis
from lightning_dist.placeholder import is_placeholder, placeholder
from lightning_dist.pytree import Path as TreePath
from lightning_dist.pytree import map_leaves


@dataclass(frozen=True)
class Directory:
    """An open directory of shards, its tensors unread.

    Args:
        rest: Lightning's dictionary without its large tensors.
        index: of torch.distributed.checkpoint.
        places: where in the checkpoint the tensor of each key belongs.
    """

    path: Path
    rest: dict[str, Any]
    index: Metadata
    places: list[tuple[str, TreePath]]

    @classmethod
    def open(cls, path: Path, weights_only: bool | None) -> Directory:
        """Reads all but the tensors of a directory of ours or of Lightning's; checks this rank's share of what it says
        of its files, and compares its share of them with their checksums. Nothing is communicated.

        Args:
            weights_only: as in ``torch.load``, for ``meta.pt``. The index is read by an unpickler that makes nothing
                but torch's descriptions of tensors, whatever this says.

        Raises:
            ValueError: incomplete, damaged, of a newer format, or one that claims what its files do not hold.
        """
        if is_snapshot(path):
            return cls(path, *read_snapshot(path))
        verify_directory(path, {REST, METADATA}, 0, 1)
        rest = load_pickled(path / REST, weights_only)
        check_sizes(rest, path / REST)
        index = _read_index(path)
        _leave_out_aliases(rest, index)
        _check_parts(path, index)
        _check_sizes(path, index)
        places = _places(path, rest, index)
        parts = {info.relative_path for info in index.storage_data.values()}
        verify_directory(path, parts, global_rank(), num_ranks())
        if rest.pop(MARKER, None) is not None and not (path / CHECKSUMS).is_file():
            raise DamagedCheckpoint(f"checkpoint {path} is incomplete: it has no {CHECKSUMS}; its save did not finish")
        return cls(path, rest, index, places)

    def joined(self, tensors: Iterable[tuple[TreePath, Any]]) -> dict[str, Any]:
        """Lightning's dictionary, tensors put back where they were taken out; what the rest lacks is built."""
        by_place = dict(tensors)
        joined = map_leaves(self.rest, lambda path, leaf: by_place.pop(path) if path in by_place else leaf)
        for path, value in by_place.items():
            put_at(joined, path, value)
        return _with_lists(joined) if by_place else joined


def _places(path: Path, rest: Any, index: Metadata) -> list[tuple[str, TreePath]]:
    """Where in the checkpoint each tensor of the directory belongs."""
    if not isinstance(rest, dict):
        raise ValueError(
            f"{path} is no checkpoint of Lightning: its {REST} holds a {type(rest).__name__}, no dictionary"
        )
    stored = index.state_dict_metadata
    if MARKER not in rest:
        paths = {key: index.planner_data[key] for key in stored} if index.planner_data else {}
        places = [(key, _checkpoint_path(tuple(place))) for key, place in paths.items()]
        if not any(place[0] == "state_dict" for _, place in places):
            raise ValueError(f"{path} holds no 'state_dict': it is no checkpoint of a LightningModule")
        return places
    marker = rest[MARKER]
    if not isinstance(marker, dict) or not marker.keys() >= {"format", "tensors"}:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {REST} does not say where its tensors belong")
    if marker["format"] > FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {marker['format']}, this version of lightning_dist reads up to "
            f"{FORMAT}; upgrade lightning_dist"
        )
    places = [(key, tuple(place)) for key, place in marker["tensors"]]
    lost = [key for key, _ in places if key not in stored]
    if lost:
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged: {REST} names {len(lost)} tensors that {METADATA} lacks, as {lost[0]!r}"
        )
    return places


def _checkpoint_path(path: TreePath) -> TreePath:
    """The inverse of :func:`dcp_path`, for the directories of Lightning's strategies too."""
    root = str(path[0])
    if root.startswith("optimizer_") and root.removeprefix("optimizer_").isdigit():
        return ("optimizer_states", int(root.removeprefix("optimizer_")), *path[1:])
    return ("state_dict", *path[1:]) if root == "model" else path


def _with_lists(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Dictionaries that stand for the lists of Lightning's directories, as lists."""
    states = checkpoint.get("optimizer_states")
    if isinstance(states, dict):
        checkpoint["optimizer_states"] = [states[number] for number in sorted(states)]
        for state in checkpoint["optimizer_states"]:
            state.setdefault("state", {})
            groups = state["param_groups"]
            if isinstance(groups, dict):
                state["param_groups"] = [groups[number] for number in sorted(groups)]
    return checkpoint


def _read_index(path: Path) -> Metadata:
    try:
        with (path / METADATA).open("rb") as file:
            index = _IndexUnpickler(file).load()
    except OSError:
        raise
    except Exception as error:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {METADATA} can't be read ({error})") from error
    if not isinstance(index, Metadata) or index.storage_data is None:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {METADATA} is no index of torch.distributed.checkpoint")
    return index


def _leave_out_aliases(rest: Any, index: Metadata) -> None:
    """Other names of tied parameters: for the tools of others; ours know where each tensor belongs."""
    marker = rest.get(MARKER) if isinstance(rest, dict) else None
    names = set(marker.get("aliases", ())) if isinstance(marker, dict) else set()
    for name in names:
        index.state_dict_metadata.pop(name, None)
    for where in [where for where in index.storage_data if where.fqn in names]:
        del index.storage_data[where]


def _check_parts(path: Path, index: Metadata) -> None:
    """Every file of this rank's share is there, within the directory, and long enough; no part of it is named twice."""
    by_part: dict[str, list[tuple[int, int]]] = {}
    for info in index.storage_data.values():
        by_part.setdefault(info.relative_path, []).append((info.offset, info.length))
    for name, slices in sorted(by_part.items())[global_rank() :: num_ranks()]:
        part = path / name
        if part.resolve().parent != path.resolve():
            raise ValueError(f"checkpoint {path} refers to {name!r}, outside its directory; it is refused")
        if not part.is_file():
            raise DamagedCheckpoint(f"checkpoint {path} is incomplete: its part {name} is missing")
        end, size = 0, part.stat().st_size
        for offset, length in sorted(slices):
            if offset < end or length < 0:
                raise DamagedCheckpoint(f"checkpoint {path} is damaged: {METADATA} names bytes of {name} twice")
            end = offset + length
        if size < end:
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: its part {name} has {size} bytes of at least {end}")


def _check_sizes(path: Path, index: Metadata) -> None:
    """A tensor of this rank's share is as large as its chunks, and a chunk no larger than its bytes in a file."""
    held = {(where.fqn, where.offset): info.length for where, info in index.storage_data.items()}
    for key, stored in list(index.state_dict_metadata.items())[global_rank() :: num_ranks()]:
        if isinstance(stored, TensorStorageMetadata):
            _check_chunks(path, key, stored, held)


def _check_chunks(path: Path, key: str, stored: TensorStorageMetadata, held: Mapping[Any, int]) -> None:
    total = 0
    for chunk in stored.chunks:
        count, length = math.prod(chunk.sizes), held.get((key, chunk.offsets), held.get((key, None)))
        inside = len(chunk.sizes) == len(chunk.offsets) == len(stored.size) and all(
            begin >= 0 and size >= 0 and begin + size <= whole
            for begin, size, whole in zip(chunk.offsets, chunk.sizes, stored.size, strict=True)
        )
        if not inside or length is None or count * stored.properties.dtype.itemsize > length:
            raise DamagedCheckpoint(
                f"checkpoint {path} is damaged: {METADATA} has a part of {key!r}, {tuple(chunk.sizes)} at "
                f"{tuple(chunk.offsets)}, that its files do not hold ({length} bytes)"
            )
        total += count
    if total != math.prod(stored.size):
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged: {METADATA} says that {key!r} has shape {tuple(stored.size)}, and its "
            f"parts have {total} values together"
        )


_OF_METADATA = (
    *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    *("MetadataIndex", "TensorProperties", "StorageMeta"),
)
_IN_AN_INDEX = {
    *CLASSES_OF_A_DCP_INDEX,
    *(("torch.distributed.checkpoint.metadata", name) for name in _OF_METADATA),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    *(("torch", "Size"), ("collections", "OrderedDict")),
}


class _IndexUnpickler(pickle.Unpickler):
    """Reads DCP's index, which DCP itself would unpickle without restriction."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _IN_AN_INDEX:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index does")
        return super().find_class(module, name)


def read_sharded(
    path: Path, weights: Mapping[str, Any], parameters: Mapping[str, Any], optimizers: bool, weights_only: bool | None
) -> dict[str, Any]:
    """Reads a directory of ours, or of Lightning's FSDP and ModelParallel strategies, into any layout. On every rank a
    ValueError, where :meth:`Directory.open` raises one on any.

    Args:
        weights: by the names of the state dict, tensors whose layout says which part of theirs this rank reads. Where
            there is none, or one of another shape, tensors are read whole, into host memory.
        parameters: by name, the same for the optimizer states of each.
        optimizers: read the optimizer states too.
        weights_only: as in ``torch.load``, for what is no tensor.

    Returns:
        Lightning's dictionary, its tensors DTensors in the layout of ``weights`` or plain; optimizer states by name.
    """
    directory, wanted = _open(path, optimizers, weights_only)
    targets = _targets(directory.index, dict(wanted), weights, parameters)
    with raise_on_all_ranks(f"read checkpoint {path}"):
        read_into_targets(path, targets, directory.index, weights_only)
    return directory.joined((place, targets[key]) for key, place in wanted)


def open_sharded(path: Path, optimizers: bool, weights_only: bool | None) -> dict[str, Any]:
    """As :func:`read_sharded`, for a module that is not divided yet: weights and optimizer states are
    :class:`~lightning_dist.checkpoint.lazy_tensors.OnDisk`, read when they are loaded, or looked at.
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
        return self._read([(key, None)])[key]

    def in_layout(self, likes: dict[str, Tensor]) -> dict[str, Tensor]:
        with raise_on_all_ranks(f"read checkpoint {self._directory.path}"):
            return self._read(likes.items())

    def _read(self, likes: Iterable[tuple[str, Any]]) -> dict[str, Tensor]:
        path, index = self._directory.path, self._directory.index
        stored: Mapping[str, Any] = index.state_dict_metadata
        targets = {key: _memory_for(stored[key], like) for key, like in likes}
        read_into_targets(path, targets, index, True)
        return targets


def read_into_targets(path: Path, targets: dict[str, Any], index: Metadata, weights_only: bool | None) -> None:
    """Fills tensors in place; placeholders stay, and ``None`` becomes what is no tensor. Nothing is communicated."""
    held = {key: target for key, target in sorted(targets.items()) if not is_placeholder(target)}
    memory = {key: checkpointable(target) if on_tensor_axis(target) else target for key, target in held.items()}
    reader = _MappedReader(path, memory) if is_snapshot(path) else _IndexedReader(path)
    planner = _FlatPlanner(weights_only)
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
        self.fs, self.path = ChecksumFileSystem(), path


class _MappedReader(_IndexedReader):
    """Copies what a snapshot has mapped.

    Args:
        path: of the snapshot.
        targets: what is filled, by key.
    """

    def __init__(self, path: Path, targets: Mapping[str, Any]) -> None:
        super().__init__(path)
        self._targets = targets

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills all that is planned, and no less."""
        values: dict[str, int] = {}
        for item in plan.items:
            ranges = zip(item.storage_offsets, item.lengths, strict=True)
            block = self.storage_data[item.storage_index][tuple(slice(begin, begin + n) for begin, n in ranges)]
            target = planner.resolve_tensor(item).detach()
            target.copy_(block)
            planner.commit_tensor(item, target)
            values[item.dest_index.fqn] = values.get(item.dest_index.fqn, 0) + block.numel()
        for key, target in self._targets.items():
            if values.get(key, 0) != local_part(target).numel():
                raise ValueError(f"of {key} it has {values.get(key, 0)} values of {local_part(target).numel()}")
        done = Future[None]()
        done.set_result(None)
        return done


class _FlatPlanner(DefaultLoadPlanner):
    """Loads by key; what is no tensor (Lightning's directories have such entries) as ``torch.load`` would."""

    def __init__(self, weights_only: bool | None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._weights_only = weights_only

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=self._weights_only)
