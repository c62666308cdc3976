"""The results of a trainer's loops, as the ranks have them together."""

from __future__ import annotations

from operator import attrgetter

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from torch import Tensor

from lightning_dist.logs.joint import Part, Reduced, jointly
from lightning_dist.logs.metrics import align_states


class JointResults:
    """What was logged since the last reduction, and the reduction, which puts the values of all ranks in place.

    Args:
        trainer: whose results they are.
        group: the ranks that hold different samples; None for one process.
        in_stages: whether ranks run different stages of a step.
    """

    def __init__(self, trainer: pl.Trainer, group: dist.ProcessGroup | None, in_stages: bool) -> None:
        self.trainer, self.group, self._in_stages = trainer, group, in_stages
        self._dirty = False
        """Whether a step ran, or a hook that logs, since the last reduction, as all ranks know."""
        self._of_step: dict[int, dict[str, int]] = {}
        """What was logged since the last reduction, by collection: keys with batch sizes."""
        self._of_epoch: dict[int, set[str]] = {}
        self._logs_steps: set[tuple[int, str]] = set()
        """Collections to which this rank logged values of steps, and the points at which it had them."""
        self._expected: dict[tuple[int, str], dict[str, Part]] = {}
        """What the last reduction of a step gave, by collection and point."""

    def _reduce_step(self, point: str) -> list[_Metadata]:
        """Of what any rank logged for its step since the last time, the values reduced and what they are.

        Args:
            point: name of the place in a step where all ranks are.
        """
        results = self.trainer._results
        assert results is not None
        valid = {key for key, _ in results.valid_items()}
        parts = {}
        for key, batch_size in self._of_step[id(results)].items():
            value = results[key]._forward_cache if key in valid else None
            if isinstance(value, Tensor) and value.numel() == 1:
                parts[key] = Part.of(results[key].meta, value.squeeze(), batch_size)
        self._of_step[id(results)].clear()
        self._dirty = False
        metas = []
        place = id(results), point
        if parts:
            self._logs_steps.add(place)
        # a stage that never logs knows from the last time what the others will
        expected = {} if place in self._logs_steps else self._expected.get(place, {})
        reduced = self._jointly(parts, expected)
        if self._in_stages:
            self._expected[place] = {
                key: Part.of(meta, value, 1).neutral() for key, (meta, value) in reduced.items() if value is not None
            }
        for key, (meta, value) in reduced.items():
            metric = self._entry(results, key, meta)
            metric._forward_cache = value
            if metric.is_tensor and not meta.on_epoch:
                metric.value = value
            metas.append(meta)
        return metas

    def _reduce_epoch(self) -> set[str]:
        """Of what any rank logged for its epoch since the last time; the names of the values."""
        results = self.trainer._results
        assert results is not None
        valid = {key for key, _ in results.valid_items()}
        parts = {}
        for key in self._of_epoch[id(results)] & valid:
            metric = results[key]
            # what was accumulated is weighted already; a metric has no value before it gathers
            parts[key] = Part(
                metric.meta,
                metric.meta.reduce_fx.__name__ if metric.is_tensor else "metric",
                metric.value if metric.is_tensor else None,
                metric.cumulated_batch_size if metric.is_tensor and metric.meta.is_mean_reduction else 1,
            )
        self._of_epoch[id(results)] -= valid
        gathers, names = [], set()
        for key, (meta, reduced) in self._jointly(parts).items():
            metric = self._entry(results, key, meta)
            names |= set(results._forked_name(metric, on_step=False))
            metric.__dict__["_computed"] = reduced
            if reduced is None:
                gathers.append(metric)
        if gathers:
            assert self.group is not None
            align_states([metric.value for metric in gathers], self.group)
        for metric in gathers:
            metric.compute()
        return names

    def _entry(self, results: _ResultCollection, key: str, meta: _Metadata) -> _ResultMetric:
        """Where this rank keeps the value of a name; made if only others logged it."""
        if key not in results:
            meta.sync = _Sync(
                fn=self.trainer.strategy.reduce, _should=meta.sync.should
            )  # as Lightning's own, or it errs
            results[key] = _ResultMetric(meta, is_tensor=meta.metric_attribute is None)
            results[key].to(self.trainer.strategy.root_device)
        metric = results[key]
        if meta.metric_attribute is not None and (metric.has_reset or not hasattr(metric, "value")):
            metric.value = attrgetter(meta.metric_attribute)(self.trainer.lightning_module)
        metric.has_reset = False
        metric._update_count = max(metric._update_count, 1)
        return metric

    def _jointly(self, parts: dict[str, Part], expected: dict[str, Part] | None = None) -> Reduced:
        assert self.group is not None
        return jointly(parts, self.group, self.trainer.strategy.root_device, expected)
