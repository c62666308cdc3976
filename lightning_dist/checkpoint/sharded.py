"""A directory of shards: every rank writes what it holds, and reads what it needs.

    name.ckpt/
        meta.pt         all but the large tensors, one small file (rank 0), with the format's version and
                        which tensor of the directory goes where
        *.distcp        the tensors, by torch.distributed.checkpoint
        .metadata       its index
        checksums.json  size and CRC-32 of each of these

Tensors are named ``model.<name>`` and ``optimizer_<i>.state.<name>.<key>``, as in the directories of Lightning's
FSDPStrategy. Beside them there is, in small, what Lightning's own consolidation asks for and we do not: the rest of the
optimizers' states, and the other names of tied parameters, which stand for the same bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.utils.serialization import config as serialization_config

from lightning_dist.checkpoint.checksums import UNRELATED, DamagedCheckpoint, flush, of_file, write_checksums
from lightning_dist.checkpoint.directory import FORMAT, MARKER, Directory
from lightning_dist.checkpoint.files import REST, temporary_sibling
from lightning_dist.checkpoint.lazy import LazyTensor
from lightning_dist.checkpoint.locations import file_system, is_remote, new_place, put_in_place, refuse_others, remove
from lightning_dist.checkpoint.on_disk import OnDisk
from lightning_dist.checkpoint.placement import HostMemory, boxes
from lightning_dist.checkpoint.state import model_state, named_parameters
from lightning_dist.collectives import broadcast_object, global_rank, num_ranks, raise_on_all_ranks
from lightning_dist.dtensors import empty_like_layout, local_part, on_tensor_axis
from lightning_dist.placeholder import is_placeholder, placeholder
from lightning_dist.pytree import Path as TreePath
from lightning_dist.pytree import map_leaves


@dataclass(frozen=True)
class Shards:
    """What a rank writes of a checkpoint.

    Args:
        rest: all but the large tensors; what rank 0 has counts.
        tensors: the large ones of which this rank writes a part, by their key in the directory.
        places: where in the checkpoint each key belongs.
        copies: of what this rank holds of the tensors, where the training has gone on.
    """

    rest: dict[str, Any]
    tensors: dict[str, Tensor]
    places: list[tuple[str, TreePath]]
    copies: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any], writes_plain: bool) -> Shards:
        """The part of this rank; nothing is gathered or copied.

        A part that several ranks hold is written by one of them; plain tensors are written by rank 0, whose
        buffers are the ones that count, as under Lightning's ddp, or by the first rank of each stage
        (``writes_plain``).
        """
        return cls(*_split(checkpoint, writes_plain))

    def copied(self, memory: HostMemory) -> Shards:
        """In host memory that the training does not write to."""
        copies = {key: memory.copy(local_part(tensor)) for key, tensor in self.tensors.items()}
        return Shards(memory.snapshot(self.rest), self.tensors, self.places, copies)

    def told(self) -> dict[str, Tensor]:
        """What torch.distributed.checkpoint writes: tensors that tell it which part of the whole they are."""
        told: dict[str, Tensor] = {}
        for key, tensor in self.tensors.items():
            copy = self.copies.get(key)
            if isinstance(tensor, DTensor) and (copy is not None or on_tensor_axis(tensor)):
                told[key] = boxes(tensor, copy)
            else:
                told[key] = tensor if copy is None else copy
        return told

    def nested(self) -> dict[str, Any]:
        """As :meth:`told`, by the paths of DCP, which keeps them, so that its own tools and Lightning's read the
        directory.
        """
        told, tree = self.told(), dict[str, Any]()
        for key, path in self.places:
            if key in told:
                _put(tree, _dcp_path(path), told.pop(key))  # a tied one once
        if global_rank() == 0:
            for number, state in enumerate(self.rest.get("optimizer_states") or []):
                for path, value in _small_parts(state):
                    _put(tree, (f"optimizer_{number}", *path), value)
        return tree

    def aliases(self) -> dict[str, tuple[str, TreePath]]:
        """Other names of tied parameters, with the key of the tensor and the path of the name."""
        paths = [(key, _dcp_path(path)) for key, path in self.places if path[0] == "state_dict"]
        return {name: (key, path) for key, path in paths if (name := ".".join(map(str, path))) != key}


def save_sharded(
    shards: Shards, path: Path, group: dist.ProcessGroup | None = None, planner: DefaultSavePlanner | None = None
) -> None:
    """Writes a checkpoint as a directory, which appears under its name when all ranks have finished and what they
    wrote is on the disk.

    Args:
        shards: of this rank.
        path: of the directory, local or at a URL.
        group: of all ranks, for a thread that communicates beside others. Default: the world.
        planner: brings the values, in place of those of the shards. Default: they have them.

    Communication: the plan of torch.distributed.checkpoint (a gather and a scatter of pickled descriptions
    over the world), the checksums of files (a gather of as many bytes as their names have) and three verdicts; for a
    URL one broadcast of a name.

    Raises:
        OSError, RuntimeError: on every rank, if a rank can't write; what had the name before is left whole.
        ValueError: on every rank, if the name is that of a directory with other things.
    """
    place = temporary_sibling(path)
    sums: dict[str, tuple[int, int]] = {}
    with raise_on_all_ranks(f"write checkpoint {path}", group):
        if global_rank() == 0:
            refuse_others(path)
            place = new_place(path)
            _write_rest(shards.rest, shards.places, place / REST)
            sums[REST] = of_file(place / REST)
    if is_remote(path):
        place = path.with_name(broadcast_object(place.name, group=group))
    writer = _Writer(place, sums, shards.aliases(), copy_ahead=10_000_000 if planner is None else 0)
    try:
        # The file's checksum stands for those of its records; an option of torch holds for one thread.
        _silence_torch()
        with serialization_config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            dcp.save(
                shards.nested(),
                storage_writer=writer,
                planner=planner or DefaultSavePlanner(),
                process_group=group,
                no_dist=not dist.is_initialized(),
            )
    except (CheckpointException, OSError) as error:
        if global_rank() == 0:
            remove(place)
        raise RuntimeError(f"could not write checkpoint {path}: {_first_failure(error)}") from error
    every = [sums]
    if dist.is_initialized():
        every = [{} for _ in range(num_ranks())]
        dist.all_gather_object(every, sums, group)
    with raise_on_all_ranks(f"write checkpoint {path}", group):
        if global_rank() == 0:
            write_checksums({name: found for of_rank in every for name, found in of_rank.items()}, place)
            put_in_place(place, path)


def read_sharded(path: Path, module: Module | None, optimizers: bool, weights_only: bool | None) -> dict[str, Any]:
    """Reads a directory of ours, or of Lightning's FSDP and ModelParallel strategies, into any layout.

    Args:
        path: the directory.
        module: its sharded parameters say which part of a tensor this rank reads; without it, or where names
            or shapes differ from it, tensors are read whole, into host memory.
        optimizers: read the optimizer states too.
        weights_only: as in ``torch.load``, for what is no tensor.

    Returns:
        Lightning's dictionary, its tensors DTensors in the layout of ``module`` or plain; optimizer states by
        name.

    Raises:
        ValueError: on every rank, what :meth:`Directory.open` raises on any.
    """
    with raise_on_all_ranks(f"read checkpoint {path}"):
        directory = Directory.open(path, weights_only)
    wanted = [(key, place) for key, place in directory.places if optimizers or place[0] != "optimizer_states"]
    targets = _targets(directory.index, {key: place for key, place in wanted}, module)
    with raise_on_all_ranks(f"read checkpoint {path}"):
        _read_parts(path, targets, directory.index, weights_only)
    if not optimizers:
        directory.rest.pop("optimizer_states", None)
    return directory.joined((place, targets[key]) for key, place in wanted)


def open_sharded(path: Path, optimizers: bool, weights_only: bool | None) -> dict[str, Any]:
    """As :func:`read_sharded`, for a module that is not divided yet: weights and optimizer states are read when they
    are loaded, or looked at.

    Returns:
        Lightning's dictionary, in which these are :class:`~lightning_dist.checkpoint.on_disk.OnDisk`.
    """
    with raise_on_all_ranks(f"read checkpoint {path}"):
        directory = Directory.open(path, weights_only)
    if not optimizers:
        directory.rest.pop("optimizer_states", None)
    wanted = [(key, place) for key, place in directory.places if optimizers or place[0] != "optimizer_states"]
    reader, made = _Reader(directory), dict[str, Any]()
    for key, place in wanted:
        stored = directory.index.state_dict_metadata[key]
        if isinstance(stored, TensorStorageMetadata) and place[0] in ("state_dict", "optimizer_states"):
            made.setdefault(key, OnDisk(reader, key, stored.size, stored.properties.dtype))
    now = _targets(directory.index, {key: place for key, place in wanted if key not in made}, None)
    with raise_on_all_ranks(f"read checkpoint {path}"):
        _read_parts(path, now, directory.index, weights_only)
    return directory.joined((place, made[key] if key in made else now[key]) for key, place in wanted)


# Saving


def _split(
    checkpoint: Mapping[str, Any], writes_plain: bool
) -> tuple[dict[str, Any], dict[str, Tensor], list[tuple[str, TreePath]]]:
    """The checkpoint without its large tensors, those by their key, and where in the checkpoint each key
    belongs.

    Large are all tensors of the state dict, those of optimizer states that are no scalars, and every DTensor.
    Plain ones are taken where ``writes_plain``; of what another stage holds, only the place.
    """
    tensors: dict[str, Tensor] = {}
    places: list[tuple[str, TreePath]] = []
    key_of: dict[int, str] = {}

    def take(path: TreePath, value: Any) -> Any:
        if not isinstance(value, Tensor) or not (isinstance(value, DTensor) or is_large(path, value)):
            return value
        if id(value) not in key_of:  # a tied parameter is one object under two names
            key_of[id(value)] = ".".join(map(str, _dcp_path(path)))
            if not is_placeholder(value) and (isinstance(value, DTensor) or writes_plain):
                tensors[key_of[id(value)]] = value.detach()
        places.append((key_of[id(value)], path))
        return None

    rest = map_leaves(dict(checkpoint), take)
    return rest, tensors, places


def is_large(path: TreePath, value: Tensor | LazyTensor) -> bool:
    """Whether a tensor of a checkpoint goes to the parts of a directory, rather than to the rest."""
    if path[0] == "optimizer_states":
        return len(path) > 2 and path[2] == "state" and value.ndim > 0
    return path[0] == "state_dict"


def _dcp_path(path: TreePath) -> TreePath:
    if path[0] == "optimizer_states":
        return (f"optimizer_{path[1]}", *path[2:])
    return ("model", *path[1:]) if path[0] == "state_dict" else path


def _put(tree: dict[str, Any], path: TreePath, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _small_parts(state: Mapping[str, Any]) -> Iterator[tuple[TreePath, Any]]:
    """What is no large tensor of an optimizer's state."""
    if "param_groups" in state:
        yield ("param_groups",), state["param_groups"]
    for name, values in state.get("state", {}).items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if value is not None and not isinstance(value, (dict, list, tuple)):
                yield ("state", name, key), value


def _write_rest(rest: dict[str, Any], places: list[tuple[str, TreePath]], path: Path) -> None:
    aliases = list(Shards(rest, {}, places).aliases())
    marker = {"format": FORMAT, "torch": str(torch.__version__), "tensors": places, "aliases": aliases}
    with path.open("wb") as file:
        torch.save({**rest, MARKER: marker}, file)
        flush(file)


class _Writer(dcp.FileSystemWriter):
    """DCP's writer to the local disk or to a URL, whose index does not say where it was written."""

    def __init__(
        self,
        path: Path,
        sums: dict[str, tuple[int, int]],
        aliases: dict[str, tuple[str, TreePath]],
        copy_ahead: int,
    ) -> None:
        super().__init__("", sync_files=not is_remote(path), per_thread_copy_ahead=copy_ahead)
        self.fs, self.path, self._aliases = file_system(path, sums), path, aliases

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the index, in which other names of a tensor have its parts."""
        for name, (key, path) in self._aliases.items():
            metadata.state_dict_metadata[name] = metadata.state_dict_metadata[key]
            metadata.planner_data[name] = path
            for written in results:
                same = [result for result in written if result.index.fqn == key]
                written += [replace(result, index=replace(result.index, fqn=name)) for result in same]
        super().finish(metadata, results)

    @property
    def checkpoint_id(self) -> str:
        return str(self.path)


# Loading


def _targets(index: Metadata, places: Mapping[str, TreePath], module: Module | None) -> dict[str, Any]:
    """Memory for what this rank reads; ``None`` for what is no tensor."""
    layouts: Mapping[str, Any] = {} if module is None else model_state(module)
    parameters: Mapping[str, Any] = {} if module is None else named_parameters(module)
    targets: dict[str, Any] = {}
    for key, place in places.items():
        stored = index.state_dict_metadata[key]
        if not isinstance(stored, TensorStorageMetadata):
            targets[key] = None
            continue
        like = layouts.get(place[1]) if place[0] == "state_dict" else None
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
    """Of the tensors of an open directory, when they are asked for."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def whole(self, key: str) -> Tensor:
        targets: dict[str, Any] = {key: _memory_for(self._stored(key), None)}
        self._read(targets)
        return targets[key]

    def in_layout(self, likes: dict[str, Tensor]) -> dict[str, Tensor]:
        targets: dict[str, Any] = {key: _memory_for(self._stored(key), like) for key, like in likes.items()}
        with raise_on_all_ranks(f"read checkpoint {self._directory.path}"):
            self._read(targets)
        return targets

    def _stored(self, key: str) -> Any:
        return self._directory.index.state_dict_metadata[key]

    def _read(self, targets: dict[str, Any]) -> None:
        _read_parts(self._directory.path, targets, self._directory.index, True)


def _read_parts(path: Path, targets: dict[str, Any], index: Metadata, weights_only: bool | None) -> None:
    held = {key: target for key, target in targets.items() if not is_placeholder(target)}
    memory = {key: boxes(target) if on_tensor_axis(target) else target for key, target in held.items()}
    _silence_torch()
    try:
        dcp.load(
            memory,
            storage_reader=_IndexedReader(path, index),
            planner=_FlatPlanner(weights_only),
            no_dist=True,  # each rank reads for itself; the verdict is ours
        )
    except CheckpointException as error:
        _raise_unrelated(error)
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {_first_failure(error)}") from error
    # the planner puts what is no tensor in place of None
    targets.update({key: memory[key] for key, target in targets.items() if target is None})


class _IndexedReader(dcp.FileSystemReader):
    """DCP's reader with the index that was read and checked."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__("")
        self.fs, self.path = file_system(path), path
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class _FlatPlanner(DefaultLoadPlanner):
    """Loads by key; what is no tensor (Lightning's directories have such entries) as ``torch.load`` would."""

    def __init__(self, weights_only: bool | None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._weights_only = weights_only

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=self._weights_only)


def _silence_torch() -> None:
    """Of DCP's warning that there is no process group: that is fine here.

    For the whole process: what restores warnings afterwards does so for all threads, and one may write.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _raise_unrelated(error: CheckpointException) -> None:
    for _, cause in _causes(error):
        if isinstance(cause, UNRELATED):
            raise cause


def _causes(error: CheckpointException) -> list[tuple[int, BaseException]]:
    """Of a failure, by rank."""
    pairs = sorted(error.failures.items(), key=lambda item: item[0])
    return [(rank, failure[0] if isinstance(failure, tuple) else failure) for rank, failure in pairs]


def _first_failure(error: BaseException) -> str:
    """One line for what went wrong; DCP's message is the tracebacks of all ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, cause = _causes(error)[0]
        return f"rank {rank} met {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}"
