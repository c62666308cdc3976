"""What a module logs, counted as one process counts it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from torch import Tensor
from torchmetrics import Metric

NEUTRAL = {"mean": 0.0, "sum": 0.0, "min": float("inf"), "max": float("-inf")}
"""What a step logs that is not counted, by reduction."""

_CHECKS, _ROOM = 3, 64
"""Numbers of 20 bits that stand for the names, and of values that travel with them in one all-reduce."""


def reduce_over(tensor: Tensor, group: dist.ProcessGroup, reduce_op: dist.ReduceOp | str | None) -> Tensor:
    """The tensor reduced over the ranks of a group; a new tensor.

    Lightning's own mean of an integer tensor truncates (the mean of batch sizes 6 and 7 becomes 6, seen in 2.6.6);
    here it is taken in float64.

    Args:
        tensor: on the device of the group's backend.
        group: the ranks that hold different values.
        reduce_op: ``"mean"``, ``"avg"``, ``"sum"``, ``"min"``, ``"max"``, a ``ReduceOp`` or None (sum).

    Communication: one all-reduce over the group, none for a group of one.
    """
    name = reduce_op.lower() if isinstance(reduce_op, str) else None
    mean = name in ("mean", "avg") or reduce_op == dist.ReduceOp.AVG
    tensor = tensor.double() if mean and not tensor.is_floating_point() else tensor.clone()
    num_ranks = dist.get_world_size(group)
    if num_ranks == 1:
        return tensor
    if mean:  # gloo has no ReduceOp.AVG
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group)
        return tensor / num_ranks
    op = getattr(dist.ReduceOp, name.upper()) if name else reduce_op or dist.ReduceOp.SUM
    dist.all_reduce(tensor, op, group)
    return tensor


class StepLogs:
    """Makes what the data ranks log one value, in steps and in every other hook.

    [Note: what a module logs is reduced jointly]
    A module written for one process logs without ``sync_dist``. Over several data ranks Lightning then keeps each
    rank's own value: the logged mean is that of rank 0's samples, and schedulers and callbacks that monitor it decide
    apart. With ``sync_dist`` it reduces value by value as they are logged, so ranks that log other names, or in
    another order, mix them or wait for ever. Here ``log`` only notes, and the ranks reduce all values at once, in
    float64, at points that every rank passes:

    - values of a step: when its batch ends, if the loggers write it (``log_every_n_steps``; evaluation writes each).
      Between those a value stays the rank's own, where only the progress bar shows it. If a scheduler or callback
      monitors a training step's value, at every step, before the hooks of the batch's end and after them.
    - values of an epoch: when its batches end, and again for what the hooks of its end logged, before callbacks and
      schedulers decide by it.

    A mean is weighted by batch size. A rank that did not log a name adds nothing to it and is given the value. A
    ``torchmetrics.Metric`` gathers its own state, in an order that the ranks agreed on; a rank that did not log it
    takes part. Left to Lightning: ``rank_zero_only=True``, ``sync_dist_group``, and a step's value with
    ``sync_dist=True``, which is reduced the moment it is logged.

    Whether the names are the same everywhere is seen in the all-reduce that carries the values: it starts with a hash
    of the sorted names and with its square; the sum of n equal hashes and that of their squares give each other away.

    Communication over the data ranks, at each point: one all-reduce of 0.5 kB; one more for more than 64 numbers (a
    mean is two), for minima, for maxima; where the names differ, an all-gather of the values by name instead.

    Args:
        trainer: whose results are reduced, from :meth:`attach` to :meth:`detach`.
        monitored: names by which schedulers and callbacks decide.
        group: the ranks that hold different samples; None for one process.
    """

    def __init__(self, trainer: pl.Trainer, monitored: set[str], group: dist.ProcessGroup | None) -> None:
        self.trainer, self.monitored, self.group = trainer, monitored, group
        self._shadows: list[tuple[Any, str]] = []
        self._repeats = False
        """Whether the batch is one that another rank counts."""
        self._decides: bool | None = None
        """Whether a step's value is monitored, as all ranks know; None before the first step."""
        self._writes = True
        """Whether evaluation steps log values of their own, as all ranks know."""
        self._of_step: dict[int, dict[str, int]] = {}
        """What was logged since the last reduction, by collection: keys with batch sizes."""
        self._of_epoch: dict[int, set[str]] = {}

    # ------------------------------------------------------------------ between Lightning and its results

    def attach(self) -> None:
        """Starts to note and to reduce. Works around private parts of Lightning, as seen in 2.6.6.

        ``_LoggerConnector.on_batch_end``, ``epoch_end_reached`` and ``on_epoch_end`` are called on every rank before
        values are read; so is ``on_train_epoch_end`` of the first callback that monitors, after the module's own.
        Every logged value passes ``_ResultCollection.update_metrics``.
        """
        if self.group is None or dist.get_world_size(self.group) == 1:
            return
        connector = self.trainer._logger_connector
        for name in ("on_batch_end", "epoch_end_reached", "on_epoch_end"):
            self._shadow(connector, name, partial(getattr(self, f"_{name}"), getattr(connector, name)))
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        for callback in [c for c in callbacks if isinstance(c, (EarlyStopping, Checkpoint))][:1]:
            own = callback.on_train_epoch_end
            self._shadow(callback, "on_train_epoch_end", partial(self._on_train_epoch_end, own))
        fitting = self.trainer.fit_loop.epoch_loop
        for loop in (fitting, fitting.val_loop, self.trainer.validate_loop, self.trainer.test_loop):
            results = loop._results
            self._of_step[id(results)], self._of_epoch[id(results)] = {}, set()
            self._shadow(results, "update_metrics", partial(self._update_metrics, results))

    def detach(self) -> None:
        """Gives Lightning its methods back."""
        for owner, name in self._shadows:
            vars(owner).pop(name, None)
        self._shadows.clear()

    def _shadow(self, owner: Any, name: str, method: Any) -> None:
        vars(owner)[name] = method
        self._shadows.append((owner, name))

    def _update_metrics(self, results: _ResultCollection, key: str, value: Any, batch_size: int) -> None:
        metric = results[key]
        if self._repeats:
            batch_size = 0
            if metric.is_tensor:
                dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
                value = torch.full_like(value, NEUTRAL[metric.meta.reduce_fx.__name__], dtype=dtype)
        _ResultCollection.update_metrics(results, key, value, batch_size)
        if metric.meta.sync.rank_zero_only or metric.meta.sync.group is not None:
            return
        if metric.meta.on_step and metric.is_tensor and not metric.meta.sync.should:
            self._of_step[id(results)][key] = batch_size
        if metric.meta.on_epoch:
            self._of_epoch[id(results)].add(key)

    def _on_batch_end(self, own: Any) -> None:
        connector, trainer = self.trainer._logger_connector, self.trainer
        if not trainer.training:
            if connector._first_loop_iter or self._writes:
                self._writes = bool(self._reduce_step())
        else:
            module = trainer.lightning_module
            accumulates = trainer.fit_loop._should_accumulate() and module.automatic_optimization
            written = not accumulates and (connector.should_update_logs or bool(trainer.fast_dev_run))  # type: ignore[attr-defined]
            if written or self._decides is not False:
                self._decides = self._look(self._reduce_step())
        own()
        self._repeats = False

    def _epoch_end_reached(self, own: Any) -> None:
        ran = self.trainer._logger_connector._first_loop_iter is not None
        own()
        if ran:  # evaluation says it twice
            self._reduce_epoch()

    def _on_epoch_end(self, own: Any) -> None:
        self._reduce_epoch()
        own()

    def _on_train_epoch_end(self, own: Any, *args: Any) -> None:
        self._reduce_epoch()
        own(*args)

    # ------------------------------------------------------------------ steps

    def end_training_step(self) -> None:
        """Reduces what the step logged if a scheduler or callback decides by it; every rank calls it after its step."""
        if self._shadows and self._decides is not False:
            self._decides = self._look(self._reduce_step()) or None  # hooks may log what is monitored yet

    def _look(self, metas: list[_Metadata]) -> bool:
        names = {name for meta in metas for name in (meta.name, meta.forked_name(on_step=True))}
        return bool(self._decides or names & self.monitored)

    @contextmanager
    def uncounted(self, module: torch.nn.Module) -> Iterator[None]:
        """While it lasts, metrics and logs take part in every collective but count for nothing.

        For the step of a rank that has no batch of its own left. Metric states are put back afterwards; what is
        logged, also in the hooks of the batch's end, is noted with batch size 0 and a neutral value.
        """
        metrics = [m for m in module.modules() if isinstance(m, Metric)]
        kept = [(m, m._copy_state_dict(), m._update_count, m._computed, m._forward_cache) for m in metrics]
        self._repeats = bool(self._shadows)
        yield
        for metric, state, update_count, computed, forward_cache in kept:
            for name, before in state.items():
                if isinstance(before, list) and not before:
                    # no rows, but of the right dtype and rank: torchmetrics gathers [] as a vector of floats
                    setattr(metric, name, [row[:0] for row in getattr(metric, name)])
                else:
                    setattr(metric, name, before)
            # it has been updated, with nothing; torchmetrics warns of metrics that never were
            metric._update_count, metric._computed = max(update_count, min(metric._update_count, 1)), computed
            metric._forward_cache = forward_cache
        for logged in (self.trainer._results or {}).values():
            if not logged.is_tensor and hasattr(logged, "value"):
                logged._forward_cache = logged.value._forward_cache

    # ------------------------------------------------------------------ reducing

    def _reduce_step(self) -> list[_Metadata]:
        """Of what any rank logged for its step, the values reduced and what they are."""
        results = self.trainer._results
        assert results is not None
        valid = {key for key, _ in results.valid_items()}
        parts = {}
        for key, batch_size in self._of_step[id(results)].items():
            if key in valid and (value := results[key]._forward_cache) is not None:
                parts[key] = _Part.of(results[key].meta, value, batch_size)
        self._of_step[id(results)].clear()
        metas = []
        for key, (meta, value) in self._jointly(parts).items():
            metric = self._entry(results, key, meta)
            metric._forward_cache = value
            if not meta.on_epoch:
                metric.value = value
            metas.append(meta)
        return metas

    def _reduce_epoch(self) -> None:
        results = self.trainer._results
        assert results is not None
        valid = {key for key, _ in results.valid_items()}
        parts = {}
        for key in self._of_epoch[id(results)] & valid:
            metric = results[key]
            # what was accumulated is weighted already; a metric has no value before it gathers
            parts[key] = _Part(
                metric.meta,
                metric.value if metric.is_tensor else None,
                metric.cumulated_batch_size if metric.is_tensor and metric.meta.is_mean_reduction else 1,
            )
        self._of_epoch[id(results)] -= valid
        for key, (meta, reduced) in self._jointly(parts).items():
            metric = self._entry(results, key, meta)
            if reduced is None:
                metric.compute()
            else:
                metric.__dict__["_computed"] = reduced

    def _entry(self, results: _ResultCollection, key: str, meta: _Metadata) -> _ResultMetric:
        """Where this rank keeps the value of a name; made if only others logged it."""
        if key not in results:
            results[key] = _ResultMetric(meta, is_tensor=meta.metric_attribute is None)
            results[key].to(self._device)
        metric = results[key]
        if meta.metric_attribute is not None and not hasattr(metric, "value"):
            metric.value = attrgetter(meta.metric_attribute)(self.trainer.lightning_module)
        metric.has_reset = False
        metric._update_count = max(metric._update_count, 1)
        return metric

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device

    def _jointly(self, parts: dict[str, _Part]) -> dict[str, tuple[_Metadata, Tensor | None]]:
        """The reduced values by key, of all keys that any rank has; None for a metric. See the note of the class."""
        parts = {key: parts[key] for key in sorted(parts)}
        sums = [number for part in parts.values() for number in part.summed]
        names = hashlib.sha256(repr([(key, part.kind) for key, part in parts.items()]).encode()).digest()
        checks = [int.from_bytes(names[4 * i : 4 * i + 4], "big") >> 12 for i in range(_CHECKS)]
        total = torch.zeros(2 * _CHECKS + _ROOM, dtype=torch.float64)
        total[: 2 * _CHECKS] = torch.tensor([*checks, *(check**2 for check in checks)], dtype=torch.float64)
        total, flat = total.to(self._device), self._flat(sums)
        fits = len(sums) <= _ROOM
        if fits:
            total[2 * _CHECKS :][: len(sums)] = flat
        dist.all_reduce(total, group=self.group)
        found = [int(number) for number in total[: 2 * _CHECKS].tolist()]
        num_ranks = dist.get_world_size(self.group)
        if any(num_ranks * found[_CHECKS + i] != found[i] ** 2 for i in range(_CHECKS)):
            return self._by_name(parts)
        if fits:
            flat = total[2 * _CHECKS :]
        else:
            dist.all_reduce(flat, group=self.group)
        numbers = {"sum": iter(flat)}
        for kind, op in (("min", dist.ReduceOp.MIN), ("max", dist.ReduceOp.MAX)):
            values = [part.value for part in parts.values() if part.kind == kind]
            if values:
                extremes = self._flat(values)
                dist.all_reduce(extremes, op, self.group)
                numbers[kind] = iter(extremes)
        reduced: dict[str, tuple[_Metadata, Tensor | None]] = {}
        for key, part in parts.items():
            value: Tensor | None = None
            if part.kind == "mean":
                value = next(numbers["sum"]) / next(numbers["sum"])
            elif part.kind != "metric":
                value = next(numbers[part.kind])
            reduced[key] = part.meta, value if value is None else value.to(part.value.dtype)
        return reduced

    def _flat(self, numbers: list[Any]) -> Tensor:
        tensors = [torch.as_tensor(n, dtype=torch.float64, device=self._device).detach() for n in numbers]
        return torch.stack(tensors) if tensors else torch.zeros(0, dtype=torch.float64, device=self._device)

    def _by_name(self, parts: dict[str, _Part]) -> dict[str, tuple[_Metadata, Tensor | None]]:
        """As above, where the ranks have different names."""
        everyone: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everyone, {key: part.packed() for key, part in parts.items()}, self.group)
        fold: dict[str, Any] = {"min": min, "max": max, "sum": sum}
        reduced: dict[str, tuple[_Metadata, Tensor | None]] = {}
        for key in sorted(set().union(*everyone)):
            rows = [rank[key] for rank in everyone if key in rank]
            meta = parts[key].meta if key in parts else self._unpacked(rows[0])
            kind, dtype = rows[0]["kind"], rows[0]["dtype"]
            value: float | None = None
            if kind == "mean":
                weight = sum(row["weight"] for row in rows)
                value = sum(row["value"] for row in rows) / weight if weight else float("nan")
            elif kind != "metric":
                value = fold[kind](row["value"] for row in rows)
            reduced[key] = meta, None if value is None else torch.tensor(value, dtype=dtype, device=self._device)
        return reduced

    def _unpacked(self, row: dict[str, Any]) -> _Metadata:
        meta = _Metadata(**row["meta"])
        meta.sync = _Sync(fn=self.trainer.strategy.reduce, _should=row["should"])
        return meta


class _Part(NamedTuple):
    """What one rank adds to a logged value."""

    meta: _Metadata
    value: Any
    """Of a mean, times its weight."""
    weight: Any

    @classmethod
    def of(cls, meta: _Metadata, value: Tensor, batch_size: int) -> _Part:
        return cls(meta, value * batch_size if meta.is_mean_reduction else value, batch_size)

    @property
    def kind(self) -> str:
        return "metric" if self.meta.metric_attribute is not None else self.meta.reduce_fx.__name__

    @property
    def summed(self) -> list[Any]:
        return {"mean": [self.value, self.weight], "sum": [self.value]}.get(self.kind, [])

    def packed(self) -> dict[str, Any]:
        """Without what belongs to this process."""
        meta = {name: getattr(self.meta, name) for name in self.meta.__dataclass_fields__ if name != "_sync"}
        packed = {"meta": meta, "kind": self.kind, "should": self.meta.sync.should, "value": None, "dtype": None}
        if self.kind != "metric":
            packed |= {"value": float(self.value), "weight": float(self.weight), "dtype": self.value.dtype}
        return packed


def attach_metrics(module: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Tells every torchmetrics metric of the module that the ranks of ``group`` hold different samples.

    Where they are all the ranks, a metric knows by itself, and stays free of a process group, which can be neither
    copied nor pickled.
    """
    if dist.get_world_size(group) == dist.get_world_size():
        return
    for metric in module.modules():
        if isinstance(metric, Metric) and metric.process_group is None:
            metric.process_group = group
