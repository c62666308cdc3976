"""The results of a trainer's loops, as the ranks have them together."""

from __future__ import annotations

from collections import defaultdict
from operator import attrgetter

import lightning.pytorch as pl
import torch.distributed as dist
from torch import Tensor

from lightning_dist.compat import lightning as private
from lightning_dist.compat.lightning import Metadata, ResultCollection, ResultMetric
from lightning_dist.compat.torchmetrics import num_updates, set_computed, set_num_updates, set_step_value, step_value
from lightning_dist.logs.metrics import align_states
from lightning_dist.logs.reductions import LoggedValue, Reduced, all_reduce_logged, name_of_reduction


class ReducedResults:
    """What was logged since the last reduction, and the reduction, which puts the values of all ranks in place.

    Args:
        trainer, group: see :class:`~lightning_dist.logs.StepLogs`.
        in_stages: whether ranks run different stages of a step.
    """

    def __init__(self, trainer: pl.Trainer, group: dist.ProcessGroup, in_stages: bool) -> None:
        self._trainer, self._group, self._in_stages = trainer, group, in_stages
        self.dirty = False
        """Whether a step ran, or a hook that logs, since the last reduction, as all ranks know."""
        self._of_step: dict[int, dict[str, int]] = defaultdict(dict)
        """What was logged since the last reduction, by collection: keys with batch sizes."""
        self._of_epoch: dict[int, set[str]] = defaultdict(set)
        self._logs_steps: set[tuple[int, str]] = set()
        """Collections to which this rank logged values of steps, and the points at which it had them."""
        self._expected: dict[tuple[int, str], dict[str, LoggedValue]] = {}
        """What the last reduction of a step gave, by collection and point."""

    def note_of_step(self, results: ResultCollection, key: str, batch_size: int) -> None:
        """A value was logged on this rank, to be reduced for its step."""
        self._of_step[id(results)][key] = batch_size

    def note_of_epoch(self, results: ResultCollection, key: str) -> None:
        """A value was logged on this rank, to be reduced for its epoch."""
        self._of_epoch[id(results)].add(key)

    @property
    def now(self) -> ResultCollection:
        """The collection of the loop that runs."""
        results = private.results_of(self._trainer)
        assert results is not None
        return results

    @property
    def metas_of_step(self) -> list[Metadata]:
        """How the values were logged that this rank has noted for its step."""
        return [self.now[key].meta for key in self._of_step[id(self.now)]]

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
        for key, batch_size in self._of_step[id(results)].items():
            value = step_value(results[key]) if key in valid else None
            if isinstance(value, Tensor) and value.numel() == 1:
                values[key] = LoggedValue.of(results[key].meta, value.squeeze(), batch_size)
        self._of_step[id(results)].clear()
        return values

    def reduce_epoch(self) -> set[str]:
        """Reduces what any rank logged for its epoch since the last time; the names of the values.

        Communication: see :func:`all_reduce_logged`, and :func:`align_states` and that of its own for a metric.
        """
        results = self.now
        valid = {key for key, _ in results.valid_items()}
        values = {key: _of_epoch(results[key]) for key in self._of_epoch[id(results)] & valid}
        self._of_epoch[id(results)] -= valid
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
        return all_reduce_logged(values, self._group, self._trainer.strategy.root_device, expected)


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
