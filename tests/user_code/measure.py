"""Whole tensors from the parts that ranks hold: the suite's own arithmetic, which asks nothing of what it measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Split = tuple[int, int] | None
"""Of an axis of the mesh: the dim that it splits, and how many packed pieces of it; None for copies."""


@dataclass
class Part:
    """What one rank holds of a tensor.

    Args:
        local: the numbers.
        ranks: of the tensor's mesh, nested by axis; empty for a plain tensor.
        splits: by axis of the mesh.
    """

    local: Tensor
    ranks: Any = ()
    splits: tuple[Split, ...] = ()


def part_of(tensor: Tensor) -> Part:
    """What this rank holds, a copy. Communication: none."""
    # without the functions that make whole what is computed from a parameter: the part itself is measured
    with torch._C.DisableTorchFunction():
        if not isinstance(tensor, DTensor):
            return Part(tensor.detach().clone())
        mesh = tensor.device_mesh
        splits: list[Split] = []
        for axis, placement in zip(mesh.mesh_dim_names or (), tensor._spec.placements, strict=True):
            assert not placement.is_partial(), "a sum that nobody made yet is no value"
            dim = getattr(placement, "dim", None)
            # only the tensor axis packs; the shard axis cuts what that left into rows, whatever torch calls it
            packed = getattr(placement, "split_factor", 1) if axis == "tp" else 1
            splits.append(None if dim is None else (dim, packed))
        return Part(tensor._local_tensor.detach().clone(), mesh.mesh.tolist(), tuple(splits))


def whole(parts: Sequence[Part | None], rank: int) -> Tensor:
    """The tensor of which ``parts[r]`` is held by rank ``r``, as it is for the mesh that ``rank`` is in.

    Where that rank holds nothing of it (it is in another stage of a pipeline), as it is for the first rank that does.
    """
    mine = parts[rank] or next(part for part in parts if part is not None)
    return mine.local if not mine.splits else _joined(parts, mine.ranks, mine.splits)


def _joined(parts: Sequence[Part | None], ranks: Any, splits: tuple[Split, ...]) -> Tensor:
    """Joins along the last axis what the axes before it give: the last, tp, was split first."""
    if not splits:
        part = parts[ranks]
        assert part is not None
        return part.local
    along = [_joined(parts, inner, splits[:-1]) for inner in _by_last_axis(ranks, len(splits))]
    if splits[-1] is None:
        return along[0]
    dim, packed = splits[-1]
    pieces = [part.chunk(packed, dim) for part in along]
    return torch.cat([held[piece] for piece in range(packed) for held in pieces], dim)


def _by_last_axis(ranks: Any, axes: int) -> list[Any]:
    """``ranks[..., i]`` of nested lists, for every i."""
    if axes == 1:
        return list(ranks)
    inner = [_by_last_axis(row, axes - 1) for row in ranks]
    return [list(column) for column in zip(*inner, strict=True)]
