"""What a sharded checkpoint's directory says of itself: the rest, the index of its tensors, and where each belongs."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lightning_dist.checkpoint.checksums import verify_directory
from lightning_dist.checkpoint.formats import CHECKSUMS, METADATA, REST, DamagedCheckpoint
from lightning_dist.checkpoint.single_file import check_sizes, load_pickled
from lightning_dist.collectives import global_rank, num_ranks
from lightning_dist.compat.torch import CLASSES_OF_A_DCP_INDEX
from lightning_dist.pytree import Path as TreePath
from lightning_dist.pytree import map_leaves

MARKER = "lightning_dist"
"""The entry of ``meta.pt`` that says whose the directory is."""

FORMAT = 1


@dataclass(frozen=True)
class Directory:
    """An open directory of shards, its tensors unread.

    Args:
        path: of the directory.
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
        """Reads and checks all but the tensors, which it compares with their checksums: this rank its share.

        Nothing is communicated.

        Args:
            path: the directory, of ours or of one of Lightning's strategies.
            weights_only: as in ``torch.load``, for ``meta.pt``. The index is read by an unpickler that makes nothing
                but torch's descriptions of tensors, whatever this says.

        Raises:
            ValueError: incomplete, damaged, of a newer format, or one that claims what its files do not hold.
        """
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
        """Lightning's dictionary, tensors put back where they were taken out; builds what the rest lacks (Lightning's
        directories).
        """
        by_place = dict(tensors)
        joined = map_leaves(self.rest, lambda path, leaf: by_place.pop(path) if path in by_place else leaf)
        for path, value in by_place.items():
            node = joined
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = value
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


def dcp_path(path: TreePath) -> TreePath:
    """Under which path torch.distributed.checkpoint has what is at a path of Lightning's dictionary."""
    if path[0] == "optimizer_states":
        return (f"optimizer_{path[1]}", *path[2:])
    return ("model", *path[1:]) if path[0] == "state_dict" else path


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
    """Every file of the index is there and long enough, before any rank starts to read."""
    ends: dict[str, int] = {}
    for info in index.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        part = path / name
        if part.resolve().parent != path.resolve():
            raise ValueError(f"checkpoint {path} refers to {name!r}, outside its directory; it is refused")
        if not part.is_file():
            raise DamagedCheckpoint(f"checkpoint {path} is incomplete: its part {name} is missing")
        size = part.stat().st_size
        if size < end:
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: its part {name} has {size} bytes of at least {end}")


def _check_sizes(path: Path, index: Metadata) -> None:
    """A tensor is as large as its chunks, and a chunk no larger than its bytes in a file: no memory is asked for that
    the files do not fill.
    """
    held = {(where.fqn, where.offset): info.length for where, info in index.storage_data.items()}
    for key, stored in index.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            _check_chunks(path, key, stored, held)
    by_part: dict[str, list[tuple[int, int]]] = {}
    for info in index.storage_data.values():
        by_part.setdefault(info.relative_path, []).append((info.offset, info.length))
    for name, slices in by_part.items():
        end = 0
        for offset, length in sorted(slices):
            if offset < end or length < 0:
                raise DamagedCheckpoint(f"checkpoint {path} is damaged: {METADATA} names bytes of {name} twice")
            end = offset + length


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


class _IndexUnpickler(pickle.Unpickler):
    """Reads DCP's index, which DCP itself would unpickle without restriction."""

    _ALLOWED = CLASSES_OF_A_DCP_INDEX | {
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "StorageMeta"),
        ("torch", "Size"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
        ("pathlib._local", "PosixPath"),
        ("pathlib._local", "WindowsPath"),
        ("collections", "OrderedDict"),
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index does")
        return super().find_class(module, name)
