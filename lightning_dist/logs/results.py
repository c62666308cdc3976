"""What a module logs on this rank, noted with its weight beside other ranks' values, and the results of all ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_dist.compat import lightning as private
from lightning_dist.compat.lightning import EXTRACT_BATCH_SIZE, Metadata, ResultCollection, ResultMetric
from lightning_dist.compat.torchmetrics import num_updates, set_computed, set_num_updates, set_step_value, step_value
from lightning_dist.logs.metrics import align_states
from lightning_dist.logs.reductions import LoggedValue, Reduced, all_reduce_logged, name_of_reduction, reduction_of
from lightning_dist.patches import Patches
from lightning_dist.placeholder import is_placeholder


class ReducedResults:
    """What was logged since the last reduction, and the reduction, which puts the values of all ranks in place.

    Args:
        trainer, group, hosts: see :class:`~lightning_dist.logs.StepLogs`.
        in_stages: whether ranks run different stages of a step.
    """

    def __init__(
        self, trainer: pl.Trainer, group: dist.ProcessGroup, hosts: dist.ProcessGroup, in_stages: bool
    ) -> None:
        self._trainer, self._group, self._hosts, self._in_stages = trainer, group, hosts, in_stages
        self.dirty = False
        """Whether a step ran, or a hook that logs, since the last reduction, as all ranks know."""
        self.of_step: dict[int, dict[str, int]] = defaultdict(dict)
        """What was logged on this rank since the last reduction, by collection: keys with batch sizes."""
        self.of_epoch: dict[int, set[str]] = defaultdict(set)
        self._logs_steps: set[tuple[int, str]] = set()
        """Collections to which this rank logged values of steps, and the points at which it had them."""
        self._expected: dict[tuple[int, str], dict[str, LoggedValue]] = {}
        """What the last reduction of a step gave, by collection and point."""

    @property
    def now(self) -> ResultCollection:
        """The collection of the loop that runs."""
        results = private.results_of(self._trainer)
        assert results is not None
        return results

    @property
    def metas_of_step(self) -> list[Metadata]:
        """How the values were logged that this rank has noted for its step."""
        return [self.now[key].meta for key in self.of_step[id(self.now)]]

    def reduce_step(self, point: str) -> list[Metadata]:
        """Reduces what any rank logged for its step since the last time; what the values are.

        ``point`` names the place in a step where all ranks are. Communication: see :func:`all_reduce_logged`.
        """
        results, self.dirty = self.now, False
        values, place = self._taken_of_step(results), (id(results), point)
        if values:
            self._logs_steps.add(place)
        # a stage that never logs knows from the last time what the others will
        expected = {} if place in self._logs_steps else self._expected.get(place, {})
        reduced = self._reduced(values, expected)
        if self._in_stages:
            tensors = {key: (meta, value) for key, (meta, value) in reduced.items() if value is not None}
            self._expected[place] = {key: LoggedValue.of(*tensor, 1).neutral() for key, tensor in tensors.items()}
        for key, (meta, value) in reduced.items():
            metric = self._entry(results, key, meta)
            set_step_value(metric, value)
            if metric.is_tensor and not meta.on_epoch:
                metric.value = value
        return [meta for meta, _ in reduced.values()]

    def _taken_of_step(self, results: ResultCollection) -> dict[str, LoggedValue]:
        valid = {key for key, _ in results.valid_items()}
        values = {}
        for key, batch_size in self.of_step[id(results)].items():
            value = step_value(results[key]) if key in valid else None
            if isinstance(value, Tensor) and value.numel() == 1:
                values[key] = LoggedValue.of(results[key].meta, value.squeeze(), batch_size)
        self.of_step[id(results)].clear()
        return values

    def reduce_epoch(self) -> set[str]:
        """Reduces what any rank logged for its epoch since the last time; the names of the values.

        Communication: see :func:`all_reduce_logged`, and :func:`align_states` and that of its own for a metric.
        """
        results = self.now
        valid = {key for key, _ in results.valid_items()}
        values = {key: _of_epoch(results[key]) for key in self.of_epoch[id(results)] & valid}
        self.of_epoch[id(results)] -= valid
        gathers, names = [], set()
        for key, (meta, reduced) in self._reduced(values).items():
            metric = self._entry(results, key, meta)
            names |= set(private.epoch_names(results, metric, on_step=False))
            set_computed(metric, reduced)
            if reduced is None:
                gathers.append(metric)
        if gathers:
            align_states([metric.value for metric in gathers], self._group)
        for metric in gathers:
            metric.compute()
        return names

    def _entry(self, results: ResultCollection, key: str, meta: Metadata) -> ResultMetric:
        """Where this rank keeps the value of a name; made if only others logged it."""
        strategy = self._trainer.strategy
        if key not in results:
            private.reduce_by(meta, strategy.reduce)
            results[key] = ResultMetric(meta, is_tensor=meta.metric_attribute is None)
            results[key].to(strategy.root_device)
        metric = results[key]
        if meta.metric_attribute is not None and (metric.has_reset or not hasattr(metric, "value")):
            metric.value = attrgetter(meta.metric_attribute)(self._trainer.lightning_module)
        metric.has_reset = False
        set_num_updates(metric, max(num_updates(metric), 1))  # also where only other ranks logged it
        return metric

    def _reduced(self, values: dict[str, LoggedValue], expected: dict[str, LoggedValue] | None = None) -> Reduced:
        return all_reduce_logged(values, self._group, self._trainer.strategy.root_device, expected, self._hosts)


def collections_of(trainer: pl.Trainer) -> list[ResultCollection]:
    """The collections that the loops of a trainer log to."""
    fitting = trainer.fit_loop.epoch_loop
    found = map(private.results_of, (fitting, fitting.val_loop, trainer.validate_loop, trainer.test_loop))
    return [results for results in found if results is not None]


def _of_epoch(metric: ResultMetric) -> LoggedValue:
    """What was accumulated is weighted already; a metric has no value before it gathers."""
    if not metric.is_tensor:
        return LoggedValue(metric.meta, "metric", None, 1)
    weight = metric.cumulated_batch_size if metric.meta.is_mean_reduction else 1
    return LoggedValue(metric.meta, name_of_reduction(metric.meta.reduce_fx), metric.value, weight)


def to_tensor(device: torch.device, value: Any, name: str) -> torch.Tensor:
    """In place of the method by which ``log`` takes a number: it drops its dims, which a divided number must not have.

    Communication: of a parameter of one element, an all-gather of it.
    """
    if isinstance(value, DTensor) and value.ndim and value.numel() == 1:
        value = value.full_tensor().detach()
    return private.logged_tensor(device, value, name)


def whole(results: ResultCollection, key: str, value: Any) -> Any:
    """The value as a plain tensor; None of a tensor that another stage of a pipeline holds.

    Communication: of a ``DTensor``, which all ranks of its mesh log, an all-reduce of one number per axis that it is
    divided over.

    Raises:
        ValueError: if one is logged with ``rank_zero_only=True``, as its other parts would be missing.
    """
    if is_placeholder(value):
        results[key].has_reset = True  # as if it had not been logged here
        return None
    if not isinstance(value, DTensor):
        return value
    meta = results[key].meta
    if meta.sync.rank_zero_only:
        raise ValueError(
            f"self.log({meta.name!r}, ..., rank_zero_only=True) got a number of which every rank holds a part: log it "
            "on every rank, or the number of value.full_tensor(), which every rank has to call"
        )
    return value.full_tensor()


class NotedLogs:
    """Wraps the methods by which Lightning takes what is logged, and notes it for ``results`` instead of reducing it.

    Args:
        trainer, results, is_even: see :class:`~lightning_dist.logs.StepLogs`.
        repeats_hooks: whether another stage of the pipeline runs the hooks of this one too, and counts their sums.
    """

    def __init__(
        self, trainer: pl.Trainer, results: ReducedResults, is_even: Callable[[], bool], repeats_hooks: bool
    ) -> None:
        self._trainer, self._results, self._is_even, self._repeats_hooks = trainer, results, is_even, repeats_hooks
        self.in_step, self.counts = False, True
        """Whether a step logs now, not a hook; whether the batch that runs is this rank's own."""
        self._size: int | None = None
        """First size in the batch."""
        self._is_given = False
        """Whether the user gave the batch size of the value that is logged."""

    def attach(self, results: ResultCollection, patches: Patches) -> None:
        """Begins to note what is logged to a collection."""
        patches.set(results, "update_metrics", lambda *args: self._update(results, *args))
        patches.set(results, EXTRACT_BATCH_SIZE, lambda *args: self._batch_size(results, *args))

    def begin_batch(self) -> None:
        """Another batch begins, of this rank's own."""
        self._size, self.counts = None, True

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """While it lasts, a step logs; outside of it, hooks do."""
        self.in_step = True
        try:
            yield
        finally:
            self.in_step = False

    def _batch_size(self, results: ResultCollection, value: Any, batch_size: int | None, meta: Metadata) -> int:
        # Lightning weights a step's value by whatever another `log` of this rank's batch found
        self._is_given = batch_size is not None
        if batch_size is None and not (value.is_tensor and meta.on_epoch):
            if self._size is None:
                batch: Any = results.batch
                self._size = 1
                with suppress(RecursionError):  # as Lightning finds it where it weights by it
                    self._size = next((s for s in private.sizes_in_batch(batch) if s is not None), 1)
            return self._size
        return getattr(ResultCollection, EXTRACT_BATCH_SIZE)(results, value, batch_size, meta)

    def _update(self, results: ResultCollection, key: str, value: Any, batch_size: int) -> None:
        meta, is_tensor = results[key].meta, results[key].is_tensor
        value = whole(results, key, value)
        if value is None:
            return
        if meta.sync.group is None:
            private.leave_unreduced(meta)
        is_training, reduction = self._trainer.training, reduction_of(meta.reduce_fx)
        # a rank's part of a batch may have none of what a mean is of, and the mean of nothing is nan
        nothing = is_training and meta.is_mean_reduction and not batch_size
        repeats = self._repeats_hooks and not self.in_step and is_tensor and reduction.adds_up
        if not self.counts or nothing or repeats:
            batch_size = 0
            if is_tensor:
                dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
                value = torch.full_like(value, reduction.neutral, dtype=dtype)
        ResultCollection.update_metrics(results, key, value, batch_size)
        if meta.sync.rank_zero_only or meta.sync.group is not None:
            return
        if meta.on_step and self.counts:
            # even parts of a batch count alike, whatever Lightning takes for their size
            alike = is_training and not self._is_given and self._is_even()
            self._results.of_step[id(results)][key] = min(batch_size, 1) if alike else batch_size
        if meta.on_epoch:
            self._results.of_epoch[id(results)].add(key)
