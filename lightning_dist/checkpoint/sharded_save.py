"""A directory of shards, written: every rank writes what it holds.

    name.ckpt/
        meta.pt         all but the large tensors, one small file (rank 0), with the format's version and
                        which tensor of the directory goes where
        *.distcp        the tensors, by torch.distributed.checkpoint (DCP)
        .metadata       its index
        checksums.json  size and CRC-32 of each of these

Tensors are named ``model.<name>`` and ``optimizer_<i>.state.<name>.<key>``, as in the directories of Lightning's
FSDPStrategy. Beside them there is, in small, what Lightning's own consolidation asks for and we do not: the rest of the
optimizers' states, and the other names of tied parameters, which stand for the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.utils.serialization import config as serialization_config

from lightning_dist.checkpoint import locations
from lightning_dist.checkpoint.checksums import ChecksumFileSystem, checksum_of, write_checksums
from lightning_dist.checkpoint.host_memory import HostMemory
from lightning_dist.checkpoint.lazy_tensors import LazyTensor
from lightning_dist.checkpoint.locations import REST, flush, is_remote
from lightning_dist.collectives import broadcast_object, gather_objects, global_rank, raise_on_all_ranks
from lightning_dist.dtensors import held_runs, local_part, on_tensor_axis
from lightning_dist.placeholder import is_placeholder
from lightning_dist.pytree import PLAIN, map_leaves
from lightning_dist.pytree import Path as TreePath

MARKER, FORMAT = "lightning_dist", 1
"""The entry of ``meta.pt`` that says whose the directory is, and the version that it has."""


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

        Large are all tensors of the state dict, those of optimizer states that are no scalars, and every DTensor. A
        part that several ranks hold is written by one of them. Plain tensors, whole on every rank, are written by rank
        0, whose buffers are the ones that count, as under Lightning's ddp, or by the first rank of each stage
        (``writes_plain``). Of what another stage holds there is only the place.
        """
        tensors: dict[str, Tensor] = {}
        places: list[tuple[str, TreePath]] = []
        key_of: dict[int, str] = {}

        def take(path: TreePath, value: Any) -> Any:
            if not isinstance(value, Tensor) or not (isinstance(value, DTensor) or is_large(path, value)):
                return value
            if id(value) not in key_of:  # a tied parameter is one object under two names
                key_of[id(value)] = ".".join(map(str, dcp_path(path)))
                if not is_placeholder(value) and (isinstance(value, DTensor) or writes_plain):
                    tensors[key_of[id(value)]] = value
            places.append((key_of[id(value)], path))
            return None

        rest = map_leaves(dict(checkpoint), take, skip=PLAIN)
        return cls(rest, tensors, places)

    def copied(self, memory: HostMemory) -> Shards:
        """In host memory that the training does not write to."""
        copies = {key: memory.copy(local_part(tensor)) for key, tensor in self.tensors.items()}
        return Shards(memory.snapshot(self.rest), self.tensors, self.places, copies)

    def _checkpointable(self, key: str) -> Tensor:
        tensor, copy = self.tensors[key], self.copies.get(key)
        if isinstance(tensor, DTensor) and (copy is not None or on_tensor_axis(tensor)):
            return checkpointable(tensor, copy)
        return tensor.detach() if copy is None else copy

    def nested(self) -> dict[str, Any]:
        """What DCP writes, by the paths that it keeps, so that its own tools and Lightning's read the directory."""
        written = {key: self._checkpointable(key) for key in self.tensors}
        tree: dict[str, Any] = {}
        for key, path in self.places:
            if key in written:
                put_at(tree, dcp_path(path), written.pop(key))  # a tied one once
        if global_rank() == 0:
            for number, state in enumerate(self.rest.get("optimizer_states") or []):
                for path, value in _small_parts(state):
                    put_at(tree, (f"optimizer_{number}", *path), value)
        return tree

    def aliases(self) -> dict[str, tuple[str, TreePath]]:
        """Other names of tied parameters, with the key of the tensor and the path of the name."""
        paths = [(key, dcp_path(path)) for key, path in self.places if path[0] == "state_dict"]
        return {name: (key, path) for key, path in paths if (name := ".".join(map(str, path))) != key}

    def write_rest(self, path: Path) -> None:
        """Writes the rest, and where the tensors belong."""
        aliases = list(self.aliases())
        marker = {"format": FORMAT, "torch": str(torch.__version__), "tensors": self.places, "aliases": aliases}
        with path.open("wb") as file:
            torch.save({**self.rest, MARKER: marker}, file)
            flush(file)


def save_sharded(
    shards: Shards, path: Path, group: dist.ProcessGroup | None = None, planner: DefaultSavePlanner | None = None
) -> None:
    """Writes a checkpoint as a directory, which appears under its name when all ranks have finished and what they wrote
    is on the disk.

    Args:
        shards: of this rank.
        group: of all ranks, for a thread that communicates beside others. Default: the world.
        planner: brings the values, in place of those of the shards. Default: they have them.

    Communication: the plan of torch.distributed.checkpoint (a gather and a scatter of pickled descriptions over the
    world), the checksums of files (a gather of as many bytes as their names have) and three verdicts; for a URL one
    broadcast of a name.

    Raises:
        OSError, RuntimeError: on every rank, if a rank can't write; what had the name before is left whole.
        ValueError: on every rank, if the name is that of a directory with other things.
    """
    place = locations.temporary_sibling(path)
    sums: dict[str, tuple[int, int]] = {}
    with raise_on_all_ranks(f"write checkpoint {path}", group):
        if global_rank() == 0:
            locations.validate_target(path)
            place = locations.new_directory(path)
            shards.write_rest(place / REST)
            sums[REST] = checksum_of(place / REST)
    if is_remote(path):
        place = path.with_name(broadcast_object(place.name, group=group))
    writer = _Writer(place, sums, shards.aliases(), copy_ahead=10_000_000 if planner is None else 0)
    try:
        # The file's checksum stands for those of its records; an option of torch holds for one thread.
        with serialization_config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            _write(shards.nested(), writer, planner or DefaultSavePlanner(), group)
    except (CheckpointException, Exception) as error:  # the first is no Exception
        if global_rank() == 0:
            locations.remove(place)
        raise RuntimeError(f"could not write checkpoint {path}: {_first_failure(error)}") from error
    every = gather_objects(sums, group)
    with raise_on_all_ranks(f"write checkpoint {path}", group):
        if global_rank() == 0:
            write_checksums({name: found for of_rank in every for name, found in of_rank.items()}, place)
            locations.put_in_place(place, path)


def dcp_path(path: TreePath) -> TreePath:
    """Under which path torch.distributed.checkpoint has what is at a path of Lightning's dictionary."""
    if path[0] == "optimizer_states":
        return (f"optimizer_{path[1]}", *path[2:])
    return ("model", *path[1:]) if path[0] == "state_dict" else path


def put_at(tree: dict[str, Any], path: TreePath, value: Any) -> None:
    """Puts a value into nested dictionaries, and makes those that lack."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def is_large(path: TreePath, value: Tensor | LazyTensor) -> bool:
    """Whether a tensor of a checkpoint goes to the parts of a directory, rather than to the rest."""
    if path[0] == "optimizer_states":
        return len(path) > 2 and path[2] == "state" and value.ndim > 0
    return path[0] == "state_dict"


def checkpointable(tensor: DTensor, copy: Tensor | None = None) -> Tensor:
    """What this rank holds, or a copy, with the offsets of its blocks: DCP's ``CheckpointableTensor`` protocol."""
    local = local_part(tensor) if copy is None else copy
    block: Any = local.view_as(local)  # an object of its own, which takes the attributes
    runs = list(itertools.product(*(held_runs(tensor))))
    block.global_shape = tuple(tensor.shape)
    block.local_offsets = [tuple(start for start, _, _ in run) for run in runs]
    block.global_offsets = [tuple(start for _, start, _ in run) for run in runs]
    block.local_sizes = [tuple(length for *_, length in run) for run in runs]
    return block


def _first_failure(error: BaseException) -> str:
    """One line for what went wrong; DCP's message is the tracebacks of all ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        rank = min(error.failures)
        failure = error.failures[rank]
        cause = failure[0] if isinstance(failure, tuple) else failure
        return f"rank {rank} met {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}"


class _Writer(dcp.FileSystemWriter):
    """DCP's writer to the local disk or to a URL, whose index does not say where it was written."""

    def __init__(
        self, path: Path, sums: dict[str, tuple[int, int]], aliases: dict[str, tuple[str, TreePath]], copy_ahead: int
    ) -> None:
        super().__init__("", sync_files=not is_remote(path), per_thread_copy_ahead=copy_ahead)
        self.fs, self.path, self._aliases = ChecksumFileSystem(sums), path, aliases

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


def _write(tree: dict[str, Any], writer: _Writer, planner: DefaultSavePlanner, group: dist.ProcessGroup | None) -> None:
    if dist.is_initialized():
        dcp.save(tree, storage_writer=writer, planner=planner, process_group=group)
        return
    # the steps of dcp.save in one process, which warns then: a filter of warnings would hold for all threads
    planner.set_up_planner(tree, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    local_plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([local_plan])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    writer.finish(metadata, [writer.write_data(plan, planner).wait()])


def _small_parts(state: Mapping[str, Any]) -> Iterator[tuple[TreePath, Any]]:
    """What is no large tensor of an optimizer's state."""
    if "param_groups" in state:
        yield ("param_groups",), state["param_groups"]
    for name, values in state.get("state", {}).items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if value is not None and not isinstance(value, (dict, list, tuple)):
                yield ("state", name, key), value
