"""Many logged values reduced over the ranks in one collective."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _Sync
from torch import Tensor

_CHECKS, _ROOM = 3, 64
"""Numbers of 20 bits that stand for the names, and of values that travel with them in one all-reduce."""


class Part(NamedTuple):
    """What one rank adds to a logged value."""

    meta: _Metadata
    kind: str
    """``"mean"``, ``"sum"``, ``"min"``, ``"max"``, or ``"metric"``, which gathers by itself."""
    value: Any
    """Of a mean, times its weight."""
    weight: Any

    @classmethod
    def of(cls, meta: _Metadata, value: Tensor, batch_size: int) -> Part:
        """A step's value: a scalar tensor of any dtype."""
        kind = "mean" if meta.metric_attribute is not None else meta.reduce_fx.__name__
        value = value.detach() if value.is_floating_point() else value.double()
        return cls(meta, kind, value * batch_size if kind == "mean" else value, batch_size)

    def neutral(self) -> Part:
        """What a rank adds that has nothing of it."""
        value = {"min": float("inf"), "max": float("-inf")}.get(self.kind, 0.0)
        dtype = self.value.dtype if isinstance(self.value, Tensor) else torch.float64
        return Part(self.meta, self.kind, torch.tensor(value, dtype=dtype), 0)

    @property
    def _summed(self) -> list[Any]:
        if self.kind in ("min", "max"):  # whose all-reduce may lose a nan
            return [torch.where(self.value.isnan(), self.value, 0.0)]
        return {"mean": [self.value, self.weight], "sum": [self.value]}.get(self.kind, [])

    def _packed(self) -> dict[str, Any]:
        """Without what belongs to this process."""
        meta = {name: getattr(self.meta, name) for name in self.meta.__dataclass_fields__ if name != "_sync"}
        packed = {"meta": meta, "kind": self.kind, "should": self.meta.sync.should, "value": None, "dtype": None}
        if self.kind != "metric":
            packed |= {"value": float(self.value), "weight": float(self.weight), "dtype": self.value.dtype}
        return packed


Reduced = dict[str, tuple[_Metadata, Tensor | None]]


def jointly(
    parts: dict[str, Part],
    group: dist.ProcessGroup,
    device: torch.device,
    expected: dict[str, Part] | None = None,
) -> Reduced:
    """The reduced values by key, in order of the keys, of all keys that any rank has; None for a metric.

    Whether the names are the same everywhere is seen in the all-reduce that carries the values: it starts with hashes
    of the sorted names and with their squares; the sum of n equal hashes and that of their squares give each other
    away. A rank without a key adds nothing to it.

    Args:
        parts: what this rank adds, by key.
        group: the ranks that hold different samples; all of them call it.
        device: of the collectives.
        expected: what other ranks are likely to have of which this one has none, as neutral parts: with them the names
            are the same everywhere. They count for nothing.

    Communication over the group: one all-reduce of 0.5 kB; one more for more than 64 numbers (a mean is two), for
    minima, for maxima; where the names differ, an all-gather of the values by name instead of those.
    """
    own = {key: parts[key] for key in sorted(parts)}
    parts = {**(expected or {}), **parts}
    parts = {key: parts[key] for key in sorted(parts)}
    sums = [number for part in parts.values() for number in part._summed]
    names = hashlib.sha256(repr([(key, part.kind) for key, part in parts.items()]).encode()).digest()
    checks = [int.from_bytes(names[4 * i : 4 * i + 4], "big") >> 12 for i in range(_CHECKS)]
    total = torch.zeros(2 * _CHECKS + _ROOM, dtype=torch.float64)
    total[: 2 * _CHECKS] = torch.tensor([*checks, *(check**2 for check in checks)], dtype=torch.float64)
    total, flat = total.to(device), _flat(sums, device)
    fits = len(sums) <= _ROOM
    if fits:
        total[2 * _CHECKS :][: len(sums)] = flat
    dist.all_reduce(total, group=group)
    found = [int(number) for number in total[: 2 * _CHECKS].tolist()]
    num_ranks = dist.get_world_size(group)
    if any(num_ranks * found[_CHECKS + i] != found[i] ** 2 for i in range(_CHECKS)):
        return _by_name(own, group, device)
    if fits:
        flat = total[2 * _CHECKS :]
    else:
        dist.all_reduce(flat, group=group)
    numbers = {"sum": iter(flat)}
    for kind, op in (("min", dist.ReduceOp.MIN), ("max", dist.ReduceOp.MAX)):
        values = [part.value for part in parts.values() if part.kind == kind]
        if values:
            extremes = _flat(values, device)
            dist.all_reduce(extremes, op, group)
            numbers[kind] = iter(extremes)
    reduced: Reduced = {}
    for key, part in parts.items():
        value: Tensor | None = None
        if part.kind == "mean":
            value = next(numbers["sum"]) / next(numbers["sum"])
        elif part.kind == "sum":
            value = next(numbers["sum"])
        elif part.kind != "metric":
            value = next(numbers[part.kind]) + next(numbers["sum"])
        reduced[key] = part.meta, value if value is None else value.to(part.value.dtype)
    return reduced


def _flat(numbers: list[Any], device: torch.device) -> Tensor:
    tensors = [torch.as_tensor(n, dtype=torch.float64, device=device).detach() for n in numbers]
    return torch.stack(tensors) if tensors else torch.zeros(0, dtype=torch.float64, device=device)


def _by_name(parts: dict[str, Part], group: dist.ProcessGroup, device: torch.device) -> Reduced:
    """As above, where the ranks have different names."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, {key: part._packed() for key, part in parts.items()}, group)
    reduced: Reduced = {}
    for key in sorted(set().union(*everyone)):
        rows = [rank[key] for rank in everyone if key in rank]
        meta = parts[key].meta if key in parts else _unpacked(rows[0])
        kind, dtype = rows[0]["kind"], rows[0]["dtype"]
        value: float | None = None
        if kind == "mean":
            weight = sum(row["weight"] for row in rows)
            value = sum(row["value"] for row in rows) / weight if weight else float("nan")
        elif kind != "metric":
            value = float(getattr(torch.tensor([row["value"] for row in rows], dtype=torch.float64), kind)())
        reduced[key] = meta, None if value is None else torch.tensor(value, dtype=dtype, device=device)
    return reduced


def _unpacked(row: dict[str, Any]) -> _Metadata:
    meta = _Metadata(**row["meta"])
    meta.sync = _Sync(_should=row["should"])
    return meta
