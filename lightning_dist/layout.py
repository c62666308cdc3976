"""Layout: how many ranks each axis of parallelism gets, checked before any process group forms."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_dist.compat.distributed import flattened_mesh, forget_earlier_meshes

REST = -1
"""The degree that takes whatever the other axes leave of the world."""
MESH_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Axes of the device mesh, outermost first: ``tp`` is innermost, so that it stays inside a node."""


@dataclass(frozen=True)
class ParallelMesh:
    """The ranks of a layout along its axes.

    Args:
        root: with the axes ``pp, dp_replicate, dp_shard, cp, tp``, those of degree 1 included.
        data: the ranks with different samples (``dp_replicate`` x ``dp_shard``), as one axis.
        logs: the ranks that log different values: of different samples, or in different stages (``pp`` x ``data``).
    """

    root: DeviceMesh
    data: DeviceMesh
    logs: DeviceMesh

    @property
    def pipelines(self) -> list[list[int]]:
        """The ranks of every pipeline of the world, by stage."""
        return self.root.mesh.movedim(MESH_AXES.index("pp"), -1).flatten(0, -2).tolist()

    @property
    def data_groups(self) -> list[list[int]]:
        """The ranks with different samples of what other ranks of the world hold, or compute, alike."""
        return self.root.mesh.movedim((1, 2), (-2, -1)).flatten(-2).flatten(0, -2).tolist()


@dataclass(frozen=True)
class Layout:
    """A degree of parallelism per axis.

    Args:
        pp: pipeline stages.
        dp_replicate: copies of the (possibly sharded) model that see different samples, as in DDP.
        dp_shard: ranks that share one copy of parameters, gradients and optimizer states, as in FSDP, and see
            different samples.
        cp: ranks that share one sequence.
        tp: ranks that share one matrix multiplication.
        ep: ranks that share the experts of a mixture; borrowed from ``dp_shard`` x ``cp``, so it does not count
            towards the world size.

    One of the axes but ``ep`` may be -1: it takes what the others leave of the world. Raises a ValueError for a degree
    that is zero, negative, not an integer, or a second -1.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for axis, degree in self.items():
            rest = "or -1 for what the other axes leave"
            if isinstance(degree, bool) or not isinstance(degree, int):
                given = f"layout axis {axis!r} needs an integer degree, got {degree!r}"
                raise ValueError(f"{given}; pass the number of ranks, {rest}")
            if degree < 1 and degree != REST:
                raise ValueError(f"layout axis {axis!r} has degree {degree}; a degree is at least 1, {rest}")
        if self.ep == REST:
            raise ValueError("layout axis 'ep' borrows from dp_shard x cp, so it can't be -1; pass its degree")
        open_axes = [axis for axis, degree in self.items() if degree == REST]
        if len(open_axes) > 1:
            both = " and ".join(open_axes)
            raise ValueError(f"layout has -1 for {both}; only one axis can take what is left, give the others a degree")

    @classmethod
    def parse(cls, value: Layout | Mapping[str, Any] | str | None) -> Layout | None:
        """The layout that a user typed: a mapping of axis to degree, or a string; ``None`` for ``"auto"``.

        Raises a ValueError for an axis that does not exist (with the closest name), or one given twice.
        """
        if value is None or value == "auto":
            return None
        if isinstance(value, Layout):
            return value
        if isinstance(value, str):
            value = _read_string(value)
        if not isinstance(value, Mapping):
            raise ValueError(
                f"layout must be a Layout, a mapping such as {{'dp_shard': 2}}, a string such as 'dp_shard=2' "
                f"or 'auto', got {type(value).__name__}: {value!r}"
            )
        for axis in value:
            _check_axis(axis)
        return cls(**dict(value))

    @classmethod
    def parse_all(cls, values: Iterable[Layout | Mapping[str, Any] | str]) -> list[Layout]:
        """Layouts that a user typed to fall back on; raises as :meth:`parse`, and for ``"auto"``."""
        values = [values] if isinstance(values, (str, Mapping, Layout)) else list(values)
        layouts = [layout for value in values if (layout := cls.parse(value)) is not None]
        if len(layouts) < len(values):
            raise ValueError('fallback_layouts holds "auto", which fits any number of ranks: pass it as layout=')
        return layouts

    def items(self) -> Iterator[tuple[str, int]]:
        """Pairs of axis and degree, in the order of the fields."""
        return ((field.name, getattr(self, field.name)) for field in fields(self))

    def resolve(self, world_size: int) -> Layout:
        """The same layout with -1 replaced by what the other axes leave of ``world_size``.

        Raises a ValueError, which names the nearest layouts that do, where the degrees do not multiply to it.
        """
        known = math.prod(degree for axis, degree in self.items() if axis in MESH_AXES and degree != REST)
        open_axis = next((axis for axis, degree in self.items() if degree == REST), None)
        if world_size % known or (open_axis is None and known != world_size):
            several, are = "a multiple of " if open_axis else "", "is" if world_size == 1 else "are"
            near = ", ".join(f'"{layout}"' for layout in self._nearest(world_size))
            raise ValueError(
                f"layout {self} needs {several}{known} ranks, but there {are} {world_size}; layouts that fit: {near}"
            )
        resolved = self if open_axis is None else replace(self, **{open_axis: world_size // known})
        if (resolved.dp_shard * resolved.cp) % resolved.ep:
            raise ValueError(
                f"layout {resolved} has ep={resolved.ep}, which borrows from dp_shard x cp = "
                f"{resolved.dp_shard * resolved.cp} and must divide it"
            )
        return resolved

    @property
    def world_size(self) -> int:
        """Number of ranks of a resolved layout."""
        return math.prod(getattr(self, axis) for axis in MESH_AXES)

    @property
    def num_data_ranks(self) -> int:
        """Number of groups of ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    def data_rank(self, rank: int) -> int:
        """Which of :attr:`num_data_ranks` a rank of a resolved layout is in."""
        place = self.coordinates(rank)
        return place["dp_replicate"] * self.dp_shard + place["dp_shard"]

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank of a resolved layout lies along each axis of the mesh."""
        place = {}
        for axis in reversed(MESH_AXES):
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return place

    @property
    def holds_shards(self) -> bool:
        """Whether a rank holds less than the whole of some parameters."""
        return self.dp_shard > 1 or self.tp > 1 or self.pp > 1

    @property
    def holds_parts_of_blocks(self) -> bool:
        """Whether a rank holds less than the whole of a block."""
        return self.dp_shard > 1 or self.tp > 1

    def build_mesh(self, device_type: str) -> ParallelMesh:
        """The device mesh of a resolved layout. Creates the process groups, so every rank calls it."""
        forget_earlier_meshes()
        root = init_device_mesh(device_type, tuple(getattr(self, axis) for axis in MESH_AXES), mesh_dim_names=MESH_AXES)
        data = _joined(root, ("dp_replicate", "dp_shard"), "data")
        logs = data if self.pp == 1 else _joined(root, ("pp", "dp_replicate", "dp_shard"), "logs")
        return ParallelMesh(root, data, logs)

    def _nearest(self, world_size: int, count: int = 3) -> list[Layout]:
        """Layouts of ``world_size`` ranks, those with the fewest and smallest changes of degree first."""
        asked = {axis: max(degree, 1) for axis, degree in self.items() if axis in MESH_AXES}
        free = [axis for axis in MESH_AXES if asked[axis] > 1 or axis in ("dp_replicate", "dp_shard")]

        def distance(degrees: tuple[int, ...]) -> tuple[int, float]:
            pairs = [(asked[axis], degree) for axis, degree in zip(free, degrees, strict=True)]
            return sum(a != d for a, d in pairs), sum(abs(math.log(d / a)) for a, d in pairs)

        ranked = sorted(_factorizations(world_size, len(free)), key=distance)[:count]
        return [Layout(**dict(zip(free, degrees, strict=True))) for degrees in ranked]

    def __str__(self) -> str:
        """``"dp_replicate=2,dp_shard=2"``: what :meth:`parse` reads; axes of degree 1 are left out."""
        parts = [f"{axis}={degree}" for axis, degree in self.items() if degree != 1]
        return ",".join(parts) or "dp_replicate=1"


def _joined(root: DeviceMesh, axes: tuple[str, ...], name: str) -> DeviceMesh:
    """Axes as one; the one of them that has more than one rank as it is: every process group costs memory on a GPU."""
    several = [axis for axis in axes if root[axis].size() > 1]
    return flattened_mesh(root[axes], name) if len(several) > 1 else root[several[0] if several else axes[-1]]


def _check_axis(axis: object) -> None:
    known = [field.name for field in fields(Layout)]
    if axis not in known:
        close = difflib.get_close_matches(str(axis), known, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"layout has no axis {axis!r}{hint} The axes are {', '.join(known)}")


def _read_string(text: str) -> dict[str, int]:
    degrees: dict[str, int] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        axis, equals, degree = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"layout {text!r}: {part!r} is not axis=degree; write for example 'dp_shard=2,tp=2'")
        _check_axis(axis)
        if axis in degrees:
            raise ValueError(f"layout {text!r} names the axis {axis!r} twice")
        try:
            degrees[axis] = int(degree)
        except ValueError:
            raise ValueError(f"layout axis {axis!r} needs an integer degree, got {degree!r}") from None
    if not degrees:
        raise ValueError(f"layout {text!r} names no axis; write for example 'dp_shard=2', or 'auto'")
    return degrees


def _factorizations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factorizations(number // first, parts - 1):
                yield (first, *rest)
