"""What one rank puts into a snapshot: the tensors it writes, where they belong, and all the rest."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_dist.checkpoint.sharded_save import dcp_path, is_large
from lightning_dist.compat.torch import NormBase
from lightning_dist.dtensors import held_runs, local_part
from lightning_dist.placeholder import is_placeholder
from lightning_dist.pytree import CONTAINERS, PLAIN, map_leaves
from lightning_dist.pytree import Path as TreePath

ALIGNED = 64
"""Bytes of which each tensor begins at a multiple."""


@dataclass(frozen=True)
class Reference:
    """Stands in what is pickled for the tensor of a key."""

    key: str


@dataclass(frozen=True)
class Row:
    """A tensor in a slot's table.

    Args:
        key: its name among the tensors of the snapshot.
        dtype, size: of the plain model's tensor.
        shape: of this rank's part of it; None where another rank writes it.
        offset: of its first byte.
        blocks: for each block of the part where it begins in that, where in the plain tensor, and its size.
        is_mean: whether ranks hold different values, whose mean counts where other ranks go on.
        is_stale: whether another stage changes it, whose values count then.
    """

    key: str
    dtype: torch.dtype
    size: tuple[int, ...]
    shape: tuple[int, ...] | None
    offset: int = 0
    blocks: tuple[tuple[tuple[int, ...], ...], ...] = ()
    is_mean: bool = False
    is_stale: bool = False


@dataclass
class Found:
    """Tensors of a state, by key, and where those belong that layouts divide.

    Args:
        names: in dictionaries like those of the state, for each place of a tensor its key, the place, and whether
            layouts divide it; from one step to the next.
    """

    names: dict[Any, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    places: list[tuple[str, TreePath]] = field(default_factory=list)
    are_known: bool = True
    """Whether all of them were where they were."""

    def take(self, tree: Any, names: dict[Any, Any]) -> Any:
        """The tree with what stands for tensors in what is pickled. As :func:`map_leaves`, in a third of the time."""
        is_list = type(tree) in (list, tuple)
        new: dict[Any, Any] = {}
        for key, value in enumerate(tree) if is_list else tree.items():
            if type(value) in PLAIN:
                continue
            if type(value) in CONTAINERS:
                known = names.get(key)
                taken = self.take(value, known if type(known) is dict else {})
            elif isinstance(value, Tensor):
                taken = self._take_tensor(value, names.get(key))
            else:
                continue
            if taken is not value:
                new[key] = taken
        if not new:
            return tree
        if is_list:
            return type(tree)(new.get(key, value) for key, value in enumerate(tree))
        result = copy.copy(tree)
        result.update(new)
        return result

    def _take_tensor(self, value: Tensor, name: tuple[str, TreePath, bool] | None) -> Any:
        """A tied parameter is one object under two names."""
        if type(name) is not tuple:
            self.are_known = self.are_known and _is_pickled(value)
            return value
        key, path, placed = name
        if self.tensors.setdefault(key, value) is not value:
            self.are_known = False  # no longer tied
        if placed:
            self.places.append((key, path))
            return None
        return Reference(key)


def _is_pickled(value: Tensor) -> bool:
    """Whether it is no matter of bytes in a row."""
    return not is_placeholder(value) and _local(value).layout != torch.strided


def _names(checkpoint: Mapping[str, Any]) -> dict[Any, Any]:
    """As of :class:`Found`."""
    names: dict[Any, Any] = {}
    keys: dict[int, str] = {}

    def name(path: TreePath, value: Any) -> Any:
        if not isinstance(value, Tensor) or _is_pickled(value):
            return value
        key = ".".join(map(str, dcp_path(path)))
        while id(value) not in keys and key in keys.values():  # names that have dots
            key += "'"
        node = names
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = keys.setdefault(id(value), key), path, isinstance(value, DTensor) or is_large(path, value)
        return value

    map_leaves(dict(checkpoint), name)
    return names


class PartOfState:
    """What this rank writes, step after step: the table is made anew only where names, shapes or dtypes change.

    Args:
        module: whose state it is.
        replica: which of those ranks of this node that hold the same parameters this is, and how many they are; each
            writes its share of parameters and optimizer states. All else is written by every rank, as it has it.
        stale: names of buffers that other stages change.
    """

    def __init__(self, module: nn.Module, replica: tuple[int, int], stale: Collection[str] = ()) -> None:
        self._module, self._replica, self._stale = module, replica, stale
        self._signature: Any = None
        self._names: dict[Any, Any] = {}
        self.rows: list[Row] = []
        self.written: list[Row] = []
        """Of the tensors that this rank writes."""
        self.table = b""
        self.nbytes = 0
        """Of the tensors."""

    def find(self, checkpoint: Mapping[str, Any], own: Any) -> tuple[list[Tensor], bytes]:
        """The tensors that this rank writes, in the order of :attr:`written`, and the rest, pickled.

        Args:
            checkpoint: Lightning's dictionary.
            own: of this rank alone.
        """
        found = Found(self._names)
        rest = found.take(dict(checkpoint), found.names)
        if not found.are_known or self._signature != _signature(found):
            found = Found(_names(checkpoint))
            rest = found.take(dict(checkpoint), found.names)
            self._names, self._signature = found.names, _signature(found)
            self._lay_out(found)
        small = _pickled({"rest": rest, "own": own})
        return [_local(found.tensors[row.key]) for row in self.written], small

    def _lay_out(self, found: Found) -> None:
        parameters = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
        alike = [key for key, path in found.places if path[0] == "optimizer_states" or path[1] in parameters]
        left = self._left_to_others(alike, found.tensors)
        statistics = set(_statistics(self._module))
        means = {key for key, path in found.places if path[0] == "state_dict" and path[1] in statistics}
        stale = {key for key, path in found.places if path[0] == "state_dict" and path[1] in self._stale}
        self.rows, self.nbytes = [], 0
        for key, tensor in found.tensors.items():
            row = self._row(key, tensor, key in left)
            self.rows.append(replace(row, is_mean=key in means, is_stale=key in stale))
        self.written = [row for row in self.rows if row.shape is not None]
        self.table = pickle.dumps((self.rows, found.places))

    def _left_to_others(self, alike: Iterable[str], tensors: Mapping[str, Tensor]) -> set[str]:
        """What other replicas write: each the next tensor that has the fewest bytes by then."""
        index, count = self._replica
        loads, left = [0] * count, set[str]()
        for key in dict.fromkeys(alike):
            writer = loads.index(min(loads))
            loads[writer] += tensors[key].nbytes
            if writer != index:
                left.add(key)
        return left

    def _row(self, key: str, tensor: Tensor, is_left: bool) -> Row:
        size = tuple(tensor.shape)
        if is_left or is_placeholder(tensor):
            return Row(key, tensor.dtype, size, None)
        local, offset = local_part(tensor), self.nbytes
        self.nbytes += -(-local.nbytes // ALIGNED) * ALIGNED
        blocks: list[tuple[tuple[int, ...], ...]] = [((0,) * local.ndim, (0,) * local.ndim, size)]
        if isinstance(tensor, DTensor):
            runs = itertools.product(*held_runs(tensor))
            blocks = [tuple(zip(*run, strict=True)) if run else ((), (), ()) for run in runs]
        return Row(key, tensor.dtype, size, tuple(local.shape), offset, tuple(blocks))


def _signature(found: Found) -> Any:
    return [(key, t.shape, t.dtype) for key, t in found.tensors.items()], found.places


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds; :func:`local_part` without a new tensor where that is one already."""
    return local_part(tensor) if isinstance(tensor, DTensor) or tensor.requires_grad else tensor


class _Pickler(pickle.Pickler):
    """Pickles tensors of the host as arrays: torch's own way writes an archive for each."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and obj.device.type == "cpu" and obj.layout == torch.strided and not obj.requires_grad:
            try:
                return torch.from_numpy, (obj.numpy(),)
            except TypeError:  # a dtype that numpy lacks
                return NotImplemented
        return NotImplemented


def _pickled(value: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=5).dump(value)
    return stream.getvalue()


def _statistics(module: nn.Module) -> Iterable[str]:
    """Names of the running statistics of norms, which each data rank has of its own samples."""
    for name, child in module.named_modules():
        if isinstance(child, NormBase):
            for of_child, buffer in child.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    yield f"{name}.{of_child}" if name else of_child
