"""Microbatches: parts of a batch of any nested structure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from torch import Tensor

from lightning_dist.pytree import deep_leaves, deep_map, rebuilt

EACH = "each"
"""Says in ``batch_split``: a list with one item for each sample."""

BatchSplit = Callable[[Any, int], Sequence[Any]] | Mapping[str, Any] | Sequence[Any] | int | str
"""How a user says where a batch has its samples."""


class Splitter:
    """Cuts batches into microbatches.

    Args:
        how: a function of a batch and a number of parts that returns so many parts, or fewer. Or a tree like the batch
            (or like the upper part of it): the dim of its samples for tensors and arrays, :data:`EACH` for a list of
            one item a sample, None for what every microbatch gets as it is. By default, tensors and arrays whose first
            dim is the batch are split along it, and lists of as many items.
    """

    def __init__(self, how: BatchSplit | None = None) -> None:
        self._how = how

    def size(self, batch: Any) -> int:
        """Number of samples; raises a ValueError where there is nothing to split."""
        if self._how is None or callable(self._how):
            return batch_size(batch)
        return _size(batch, self._how)

    def split(self, batch: Any, num_parts: int) -> tuple[list[Any], list[int]]:
        """The batch in parts of nearly the same size, and their sizes; the first ones are larger by one."""
        if callable(self._how):
            parts = list(self._how(batch, num_parts))
            if not 0 < len(parts) <= num_parts:
                raise ValueError(
                    f"batch_split was asked for {num_parts} parts of a batch, and gave {len(parts)}; return as many, "
                    "or fewer, but one"
                )
            return parts, [batch_size(part) for part in parts]
        small, larger = divmod(self.size(batch), num_parts)
        sizes = [small + (part < larger) for part in range(num_parts)]
        dims = self._dims(batch)
        return [_part(batch, dims, end - n, end) for n, end in zip(sizes, accumulate(sizes), strict=True)], sizes

    def first(self, batch: Any, count: int) -> Any:
        """The first samples of a batch."""
        if callable(self._how):
            return self.split(batch, max(1, self.size(batch) // count))[0][0]
        return _part(batch, self._dims(batch), 0, count)

    def _dims(self, batch: Any) -> Any:
        return sample_places(batch) if self._how is None else self._how


def sample_places(batch: Any) -> Any:
    """Where a batch has its samples, as a tree that :class:`Splitter` takes; raises as :func:`batch_size`."""
    return _places(batch, batch_size(batch), True)


def batch_size(batch: Any) -> int:
    """Number of samples: the size that most tensors of the batch, or the first of them, have in their first dim.

    Tensors in lists inside of the batch count where there are no others. Lists of as many items, of which some are
    dictionaries, or whose tensors are of several sizes, have a sample an item. Raises a ValueError without any tensor.
    """
    direct, nested = _arrays(batch)
    if not direct:
        is_sequence = type(batch) in (list, tuple)
        items = batch if is_sequence else batch.values() if isinstance(batch, Mapping) else ()
        lists = [item for item in items if type(item) in (list, tuple)]
        if lists and len({len(item) for item in lists}) == 1 and any(map(_is_by_sample, lists)):
            return len(lists[0])
    sizes = Counter(array.shape[0] for array in direct or nested)
    if not sizes:
        raise ValueError(
            f"pp splits a batch along the first dim of its tensors, and this one ({type(batch).__name__}) has none; "
            "give the step a nested structure of tensors, or say with batch_split= how it is split"
        )
    return sizes.most_common(1)[0][0]


def _places(value: Any, total: int, is_top: bool) -> Any:
    """Where a batch of so many samples has them, as a tree for :class:`Splitter`."""
    if isinstance(value, (Tensor, np.ndarray)):
        return 0 if value.ndim and value.shape[0] == total else None
    if type(value) in (list, tuple):
        is_plain = all(isinstance(item, (str, bytes, int, float)) for item in value)
        if len(value) == total and (is_plain or (not is_top and _is_each(value, total))):
            return EACH
        return [_places(item, total, False) for item in value]
    if isinstance(value, Mapping):
        return {key: _places(item, total, False) for key, item in value.items()}
    is_data = is_dataclass(value) and not isinstance(value, type)
    return _Fields(total) if is_data or deep_leaves(value) != [value] else None


@dataclass(frozen=True)
class _Fields:
    """The tensors of an object, at any depth, whose first dim is the batch."""

    total: int


def _is_each(value: Any, total: int) -> bool:
    """Whether a list of as many items as samples has one for each, and not a few batches."""
    return _is_by_sample(value) or any(array.shape[0] != total for array in _all_arrays(value))


def _is_by_sample(value: Any) -> bool:
    sizes = {array.shape[0] for array in _all_arrays(value)}
    return len(sizes) > 1 or any(isinstance(item, Mapping) for item in value)


def _all_arrays(value: Any) -> list[Any]:
    return [leaf for leaf in deep_leaves(value) if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim]


def _arrays(batch: Any) -> tuple[list[Any], list[Any]]:
    """Those of the batch itself and of dictionaries in it; and those in lists further inside."""
    direct: list[Any] = []
    nested: list[Any] = []

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, (Tensor, np.ndarray)):
            if value.ndim:
                (direct if depth < 2 else nested).append(value)
        elif type(value) in (list, tuple):
            for item in value:
                visit(item, depth + 1)
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item, depth)
        else:
            direct.extend(_all_arrays(value))

    visit(batch, 0)
    return direct, nested


def _size(value: Any, dims: Any) -> int:
    """Number of samples, of the first leaf of which ``dims`` says where they are."""
    found = _sizes(value, dims)
    if not found:
        kind = type(value).__name__
        raise ValueError(f"batch_split={dims!r} says of no part of a batch ({kind}) where its samples are")
    if len({*found}) > 1:
        raise ValueError(f"batch_split={dims!r} finds different numbers of samples in a batch: {sorted({*found})}")
    return found[0]


def _sizes(value: Any, dims: Any) -> list[int]:
    if dims is None:
        return []
    if dims == EACH:
        return [len(value)]
    if isinstance(dims, int):
        return [array.shape[dims] for array in _all_arrays(value)]
    return [size for key in _keys(value, dims) for size in _sizes(value[key], dims[key])]


def _keys(value: Any, dims: Any) -> list[Any]:
    if isinstance(dims, Mapping) and isinstance(value, Mapping):
        if unknown := dims.keys() - value.keys():
            raise ValueError(f"batch_split names {sorted(unknown)}, and the batch has {sorted(map(str, value))}")
        return list(dims)
    if isinstance(dims, (list, tuple)) and isinstance(value, (list, tuple)) and len(dims) == len(value):
        return list(range(len(value)))
    raise ValueError(
        f"batch_split has {dims!r} where the batch has a {type(value).__name__}; give it the structure of the batch"
    )


def _part(value: Any, dims: Any, begin: int, end: int) -> Any:
    if dims is None:
        return value
    if isinstance(dims, _Fields):
        return deep_map(value, lambda leaf: _part(leaf, _places(leaf, dims.total, False), begin, end))
    if dims == EACH:
        return value[begin:end]
    if isinstance(dims, int):
        return deep_map(value, lambda leaf: _cut(leaf, dims, begin, end))
    keys = set(_keys(value, dims))
    if isinstance(value, Mapping):
        parts = {key: _part(item, dims[key], begin, end) if key in keys else item for key, item in value.items()}
        return parts if type(value) is dict else rebuilt(value, parts)
    return type(value)(_part(item, dims[index], begin, end) for index, item in enumerate(value))


def _cut(leaf: Any, dim: int, begin: int, end: int) -> Any:
    if not isinstance(leaf, (Tensor, np.ndarray)) or leaf.ndim <= dim:
        return leaf
    if isinstance(leaf, Tensor):
        return leaf.narrow(dim, begin, end - begin)
    return leaf[(slice(None),) * dim + (slice(begin, end),)]
