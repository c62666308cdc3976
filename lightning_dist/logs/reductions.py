"""The reductions of ``self.log(..., reduce_fx=)``, and many logged values reduced over the ranks in one collective."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dist.compat.lightning import Metadata, packed_metadata, unpacked_metadata
from lightning_dist.transfers import to_device


@dataclass(frozen=True)
class Reduction:
    """How values become one; all that the package knows of a reduction.

    Args:
        neutral: a value that changes nothing.
        combine: of values of one shape and their weights, the one that they become.
        is_weighted: whether values travel times their weight, and weights beside them, in the sum of all names.
        extreme: the all-reduce that it needs beside that sum; None where it is a sum itself.
        adds_up: whether what is logged once for each part of a batch counts as often.
    """

    neutral: float
    combine: Callable[[Sequence[Tensor], Sequence[float]], Tensor]
    is_weighted: bool = False
    extreme: dist.ReduceOp.RedOpType | None = None
    adds_up: bool = False


def _weighted_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Values of weight 0 may be nan; the last value where there is no weight at all."""
    total = sum(weights)
    if len(values) == 1 or not total:
        return values[-1]
    wide = sum(v.double() * (weight / total) for v, weight in zip(values, weights, strict=True) if weight)
    assert isinstance(wide, Tensor)
    return wide.to(values[0].dtype) if values[0].is_floating_point() else wide.float()


REDUCTIONS = {
    "mean": Reduction(0.0, _weighted_mean, is_weighted=True),
    "sum": Reduction(0.0, lambda values, _: torch.stack([*values]).sum(0), adds_up=True),
    "min": Reduction(float("inf"), lambda values, _: torch.stack([*values]).amin(0), extreme=dist.ReduceOp.MIN),
    "max": Reduction(float("-inf"), lambda values, _: torch.stack([*values]).amax(0), extreme=dist.ReduceOp.MAX),
}
"""By Lightning's names: it takes these alone. What gathers by itself, a torchmetrics.Metric, is none of them."""


def reduction_of(reduce_fx: Any) -> Reduction:
    """The reduction that a user asks for by name or by function; a mean, unless Lightning knows it."""
    return REDUCTIONS.get(name_of_reduction(reduce_fx), REDUCTIONS["mean"])


def name_of_reduction(reduce_fx: Any) -> str:
    """The name of a reduction that is given by name or by function."""
    return reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "mean")


_CHECKS, _ROOM = 3, 64
"""Numbers of 20 bits that stand for the names, and of values that travel with them in one all-reduce."""


class LoggedValue(NamedTuple):
    """What one rank adds to a logged name."""

    meta: Metadata
    kind: str
    """A name of ``REDUCTIONS``; or ``"metric"``, which gathers by itself."""
    value: Any
    """That of a mean is times its weight."""
    weight: Any

    @classmethod
    def of(cls, meta: Metadata, value: Tensor, batch_size: int) -> LoggedValue:
        """A step's value: a scalar tensor of any dtype."""
        kind = "mean" if meta.metric_attribute is not None else name_of_reduction(meta.reduce_fx)
        value = value.detach() if value.is_floating_point() else value.double()
        return cls(meta, kind, value * batch_size if REDUCTIONS[kind].is_weighted else value, batch_size)

    @property
    def reduction(self) -> Reduction | None:
        """None for a metric."""
        return REDUCTIONS.get(self.kind)

    def neutral(self) -> LoggedValue:
        """What a rank adds that has nothing of it."""
        assert self.reduction is not None
        return self._replace(value=torch.full_like(self.value, self.reduction.neutral), weight=0)

    @property
    def summands(self) -> list[Any]:
        """Its numbers in the sum of all names."""
        if self.reduction is None:
            return []
        if self.reduction.extreme is not None:  # whose all-reduce may lose a nan
            return [torch.where(self.value.isnan(), self.value, 0.0)]
        return [self.value, self.weight] if self.reduction.is_weighted else [self.value]

    def packed(self) -> dict[str, Any]:
        """Without what belongs to this process."""
        packed: dict[str, Any] = {"meta": packed_metadata(self.meta), "kind": self.kind, "value": None, "dtype": None}
        if self.reduction is not None:
            packed |= {"value": float(self.value), "weight": float(self.weight), "dtype": self.value.dtype}
        return packed


Reduced = dict[str, tuple[Metadata, Tensor | None]]


def all_reduce_logged(
    values: dict[str, LoggedValue],
    group: dist.ProcessGroup,
    device: torch.device,
    expected: dict[str, LoggedValue] | None = None,
    hosts: dist.ProcessGroup | None = None,
) -> Reduced:
    """The reduced values by key, in order of the keys, of all keys that any rank has; None for a metric.

    Whether the names are the same everywhere the hosts ask each other, which then need not wait for their devices.
    Where the values are the hosts' own, it is seen in the all-reduce that carries them: it starts with hashes of the
    sorted names and with their squares; the sum of n equal hashes and that of their squares give each other away. A
    rank without a key adds nothing to it.

    Args:
        values: what this rank adds, by key.
        group, device: the ranks that hold different samples, all of which call it, and the device of the collectives.
        expected: what other ranks are likely to have of which this one has none, as neutral values: with them the names
            are the same everywhere. They count for nothing.
        hosts: the group, for tensors on the CPU; None where it is that for the values.

    Communication over the group: one all-reduce of 0.5 kB; one more for more than 64 numbers (a mean is two), for
    minima, for maxima; where the names differ, an all-gather of the values by name instead of those. With ``hosts``,
    one all-reduce of 16 bytes among them, and of 8 bytes a number.
    """
    every = dict(sorted({**(expected or {}), **values}.items(), key=itemgetter(0)))
    sums = [number for value in every.values() for number in value.summands]
    names = hashlib.sha256(repr([(key, value.kind) for key, value in every.items()]).encode()).digest()
    flat = _flat(sums, device)
    if hosts is not None and hosts is not group:
        if not _are_alike(names, hosts):
            return _by_name(values, group, device)
        if sums:
            dist.all_reduce(flat, group=group)
        return _taken_apart(every, flat, _extremes(every, group, device))
    checks = [int.from_bytes(names[4 * i : 4 * i + 4], "big") >> 12 for i in range(_CHECKS)]
    total = torch.zeros(2 * _CHECKS + _ROOM, dtype=torch.float64)
    total[: 2 * _CHECKS] = torch.tensor([*checks, *(check**2 for check in checks)], dtype=torch.float64)
    total = total.to(device)
    fits = len(sums) <= _ROOM
    if fits:
        total[2 * _CHECKS :][: len(sums)] = flat
    dist.all_reduce(total, group=group)
    found, num_ranks = [int(number) for number in total[: 2 * _CHECKS].tolist()], dist.get_world_size(group)
    if any(num_ranks * found[_CHECKS + i] != found[i] ** 2 for i in range(_CHECKS)):
        return _by_name(values, group, device)
    if not fits:
        dist.all_reduce(flat, group=group)
    return _taken_apart(every, total[2 * _CHECKS :] if fits else flat, _extremes(every, group, device))


def _are_alike(digest: bytes, hosts: dist.ProcessGroup) -> bool:
    number = int.from_bytes(digest[:7], "big")
    extremes = torch.tensor([number, -number])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, hosts)
    most, least = extremes.tolist()
    return most == -least


def _extremes(values: dict[str, LoggedValue], group: dist.ProcessGroup, device: torch.device) -> dict[str, Tensor]:
    """The values of each reduction that no sum can do, over the ranks."""
    reduced = {}
    for kind, reduction in REDUCTIONS.items():
        of_kind = [value.value for value in values.values() if value.kind == kind]
        if of_kind and reduction.extreme is not None:
            reduced[kind] = _flat(of_kind, device)
            dist.all_reduce(reduced[kind], reduction.extreme, group)
    return reduced


def _taken_apart(values: dict[str, LoggedValue], sums: Tensor, extremes: dict[str, Tensor]) -> Reduced:
    summed, of_kind = iter(sums), {kind: iter(numbers) for kind, numbers in extremes.items()}
    reduced: Reduced = {}
    for key, value in values.items():
        if value.reduction is None:
            reduced[key] = value.meta, None
            continue
        number = next(summed)
        if value.reduction.is_weighted:
            number = number / next(summed)
        if value.kind in of_kind:
            number = next(of_kind[value.kind]) + number
        reduced[key] = value.meta, number.to(value.value.dtype)
    return reduced


def _flat(numbers: list[Any], device: torch.device) -> Tensor:
    """One tensor on the device of numbers, and of tensors of one number; the host waits for neither."""
    if not numbers:
        return torch.zeros(0, dtype=torch.float64, device=device)
    sent = iter(to_device([n for n in numbers if not isinstance(n, Tensor)], torch.float64, device))
    tensors = (
        n.detach().to(device, torch.float64, non_blocking=True) if isinstance(n, Tensor) else next(sent)
        for n in numbers
    )
    return torch.stack([*tensors])


def _by_name(values: dict[str, LoggedValue], group: dist.ProcessGroup, device: torch.device) -> Reduced:
    """As :func:`all_reduce_logged`, where the ranks have different names."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, {key: value.packed() for key, value in values.items()}, group)
    reduced: Reduced = {}
    for key in sorted(set().union(*everyone)):
        rows = [rank[key] for rank in everyone if key in rank]
        meta = values[key].meta if key in values else unpacked_metadata(rows[0]["meta"])
        number = _of_rows(rows)
        reduced[key] = meta, None if number is None else number.to(device, rows[0]["dtype"])
    return reduced


def _of_rows(rows: list[dict[str, Any]]) -> Tensor | None:
    reduction = REDUCTIONS.get(rows[0]["kind"])
    if reduction is None:
        return None
    values = [torch.tensor(row["value"], dtype=torch.float64) for row in rows]
    weights = [row["weight"] for row in rows]
    if reduction.is_weighted:  # the values are already
        return sum(values, torch.zeros((), dtype=torch.float64)) / torch.tensor(sum(weights), dtype=torch.float64)
    return reduction.combine(values, weights)
