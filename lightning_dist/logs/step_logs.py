"""Between Lightning and its results: what a module logs becomes one value of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from torch import Tensor

from lightning_dist.data import DealtBatches
from lightning_dist.logs.joint import Part, Reduced, jointly
from lightning_dist.logs.metrics import KeptStates, align_states, give_rows_a_dim, metrics_in

NEUTRAL = {"mean": 0.0, "sum": 0.0, "min": float("inf"), "max": float("-inf")}
"""What a step logs that is not counted, by reduction."""


class StepLogs:
    """Makes what the data ranks log one value, in steps and in every other hook.

    [Note: what a module logs is reduced jointly]
    A module written for one process logs without ``sync_dist``. Over several data ranks Lightning then keeps each
    rank's own value: the logged mean is that of rank 0's samples, and schedulers and callbacks that monitor it decide
    apart. With ``sync_dist`` it reduces value by value as they are logged, so ranks that log other names, or in
    another order, mix them or wait for ever. Here ``log`` only notes, and the ranks reduce all values at once, in
    float64, at points that every rank passes:

    - values of a step: when its batch ends, if the loggers write it (``log_every_n_steps``). Between those a value
      stays the rank's own, where only the progress bar shows it. If a scheduler or callback monitors a training step's
      value, or names its file by it, or it has ``sync_dist=True``: at every step, before callbacks read it. Until all
      monitored names were seen once, every step is looked at.
    - values of an evaluation step: at every batch, if the first one logged any, and if the loader was dealt to the
      ranks (the user's own may differ in length: their step values stay the rank's own).
    - values of an epoch: when its batches end, and again for what the hooks of its end logged, before callbacks and
      schedulers decide by it.

    A mean is weighted by batch size. A rank that did not log a name adds nothing to it and is given the value. A
    ``torchmetrics.Metric`` gathers its own state, in an order that the ranks agreed on; a rank that did not log it
    takes part; its step value, which torchmetrics computes of one rank's batch, becomes the mean over the ranks. Left
    to Lightning: ``rank_zero_only=True`` and ``sync_dist_group``.

    Communication over the data ranks, at each point: see :func:`~lightning_dist.logs.joint.jointly` and, where a metric
    was logged, :func:`~lightning_dist.logs.metrics.align_states`.

    Args:
        trainer: whose results are reduced, from :meth:`attach` to :meth:`detach`.
        monitored: names by which schedulers and callbacks decide.
        group: the ranks that hold different samples; None for one process.
        dealt: the batches that an evaluation loader was dealt, by its index; None for one that was not.
        stage: where ranks run different stages of a step: this rank's place, and that of the last stage. Then each
            step's values are reduced, since a rank may have none of its own; and of a sum that every stage's hooks log
            alike, the last stage's counts.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        monitored: set[str],
        group: dist.ProcessGroup | None,
        dealt: Callable[[int], DealtBatches | None] = lambda _: None,
        stage: tuple[int, int] | None = None,
    ) -> None:
        self.trainer, self.monitored, self.group, self._dealt_by_loader = trainer, monitored, group, dealt
        self._in_stages = stage is not None
        self._repeats = stage is not None and stage[0] != stage[1]
        self._of_step_now = False
        self._shadows: list[tuple[Any, str, Any]] = []
        self._batch_idx = -1
        self._dealt: DealtBatches | None = None
        """Of the evaluation loader that runs."""
        self._kept: KeptStates | None = None
        """Of the metrics, while the batch is one that another rank counts."""
        self._decides = False
        """Whether a step's value is monitored, as all ranks know."""
        self._unknown = monitored - {"None", "epoch", "step"}
        """Monitored names that nobody logged yet, as all ranks know."""
        self._writes = True
        """Whether evaluation steps log values of their own, as all ranks know."""
        self._of_step: dict[int, dict[str, int]] = {}
        """What was logged since the last reduction, by collection: keys with batch sizes."""
        self._of_epoch: dict[int, set[str]] = {}
        self._logs_steps: set[int] = set()
        """Collections to which this rank logged values of steps."""
        self._expected: dict[int, dict[str, Part]] = {}
        """What the last reduction of a step gave, by collection."""

    # ------------------------------------------------------------------ between Lightning and its results

    def attach(self) -> None:
        """Starts to note and to reduce. Works around private parts of Lightning, as seen in 2.6.6.

        ``_LoggerConnector.on_batch_end``, ``epoch_end_reached`` and ``on_epoch_end`` are called on every rank before
        values are read; so are ``on_train_batch_end`` and ``on_train_epoch_end`` of callbacks that monitor, the latter
        after the module's own. The progress bar would compute an epoch's values on rank 0 alone. Every logged value
        passes ``_ResultCollection.update_metrics``.
        """
        if self.group is None or dist.get_world_size(self.group) == 1:
            return
        connector = self.trainer._logger_connector
        for name in ("on_batch_start", "on_batch_end", "epoch_end_reached", "on_epoch_end"):
            self._shadow(connector, name, partial(getattr(self, f"_{name}"), getattr(connector, name)))
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            decides = isinstance(callback, (EarlyStopping, Checkpoint)) or getattr(callback, "monitor", None)
            if decides:
                self._shadow(callback, "on_train_batch_end", partial(self._monitor_step, callback.on_train_batch_end))
            if decides or isinstance(callback, ProgressBar):  # which reads on rank 0 only
                own = callback.on_train_epoch_end
                self._shadow(callback, "on_train_epoch_end", partial(self._on_train_epoch_end, own))
        fitting = self.trainer.fit_loop.epoch_loop
        for loop in (fitting, fitting.val_loop, self.trainer.validate_loop, self.trainer.test_loop):
            results = loop._results
            self._of_step[id(results)], self._of_epoch[id(results)] = {}, set()
            self._shadow(results, "update_metrics", partial(self._update_metrics, results))
            self._shadow(results, "_extract_batch_size", partial(self._batch_size, results))

    def detach(self) -> None:
        """Gives Lightning its methods back."""
        for owner, name, before in reversed(self._shadows):
            vars(owner).pop(name) if before is None else vars(owner).update({name: before})
        self._shadows.clear()

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """While it lasts, a step logs; outside of it, hooks do."""
        self._of_step_now = True
        try:
            yield
        finally:
            self._of_step_now = False

    def _shadow(self, owner: Any, name: str, method: Any) -> None:
        self._shadows.append((owner, name, vars(owner).get(name)))
        vars(owner)[name] = method

    def _batch_size(self, results: _ResultCollection, value: Any, batch_size: int | None, meta: _Metadata) -> int:
        # Lightning weights a step's value by whatever another `log` of this rank's batch found
        if batch_size is None and not (value.is_tensor and meta.on_epoch):
            return 1
        return _ResultCollection._extract_batch_size(results, value, batch_size, meta)

    def _update_metrics(self, results: _ResultCollection, key: str, value: Any, batch_size: int) -> None:
        metric = results[key]
        if metric.meta.sync.group is None:
            metric.meta.sync._fn = _Sync.no_op
        # a rank's part of a batch may have none of what a mean is of, and the mean of nothing is nan
        nothing = self.trainer.training and metric.meta.is_mean_reduction and not batch_size
        is_sum = metric.is_tensor and metric.meta.reduce_fx.__name__ == "sum"
        repeats = self._repeats and not self._of_step_now and is_sum
        if self._kept or nothing or repeats:
            batch_size = 0
            if metric.is_tensor:
                dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
                value = torch.full_like(value, NEUTRAL[metric.meta.reduce_fx.__name__], dtype=dtype)
        _ResultCollection.update_metrics(results, key, value, batch_size)
        if metric.meta.sync.rank_zero_only or metric.meta.sync.group is not None:
            return
        if metric.meta.on_step and not self._kept:
            self._of_step[id(results)][key] = batch_size
        if metric.meta.on_epoch:
            self._of_epoch[id(results)].add(key)

    def _on_batch_start(self, own: Any, batch: Any, dataloader_idx: int | None = None) -> None:
        own(batch, dataloader_idx)
        if not self.trainer.training:
            self._batch_idx += 1
            self._dealt = self._dealt_by_loader(dataloader_idx or 0)
            if self._dealt is not None and not self._dealt.counts(self._batch_idx):
                self._kept = KeptStates(self.trainer.lightning_module)

    def _on_batch_end(self, own: Any) -> None:
        connector, trainer = self.trainer._logger_connector, self.trainer
        if self._kept is not None:
            self._kept.put_back()
        if not trainer.training:
            if self._dealt is not None and (self._batch_idx == 0 or self._writes):
                self._writes = bool(self._reduce_step())
        else:
            module = trainer.lightning_module
            accumulates = trainer.fit_loop._should_accumulate() and module.automatic_optimization
            written = not accumulates and (connector.should_update_logs or bool(trainer.fast_dev_run))  # type: ignore[attr-defined]
            # after the last step hooks and callbacks read its values
            if (
                self._in_stages
                or written
                or self._decides
                or self._unknown
                or trainer.fit_loop.epoch_loop._is_training_done
            ):
                self._look(self._reduce_step())
        own()
        self._kept = None

    def _epoch_end_reached(self, own: Any) -> None:
        ran = self.trainer._logger_connector._first_loop_iter is not None
        self._batch_idx = -1
        for metric in metrics_in(self.trainer.lightning_module):  # hooks may compute it by themselves
            give_rows_a_dim(metric)
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

    def _monitor_step(self, own: Any, *args: Any) -> None:
        if self._decides or self._unknown:
            self._look(self._reduce_step())
        own(*args)

    def _look(self, metas: list[_Metadata]) -> None:
        names = {name for meta in metas for name in (meta.name, meta.forked_name(on_step=True))}
        self._unknown -= names
        self._decides |= bool(names & self.monitored) or any(meta.sync.should for meta in metas)

    # ------------------------------------------------------------------ reducing

    def _reduce_step(self) -> list[_Metadata]:
        """Of what any rank logged for its step, the values reduced and what they are."""
        results = self.trainer._results
        assert results is not None
        valid = {key for key, _ in results.valid_items()}
        parts = {}
        for key, batch_size in self._of_step[id(results)].items():
            value = results[key]._forward_cache if key in valid else None
            if isinstance(value, Tensor) and value.numel() == 1:
                parts[key] = Part.of(results[key].meta, value.squeeze(), batch_size)
        self._of_step[id(results)].clear()
        metas = []
        if parts:
            self._logs_steps.add(id(results))
        # a stage that never logs knows from the last time what the others will
        expected = {} if id(results) in self._logs_steps else self._expected.get(id(results), {})
        reduced = self._jointly(parts, expected)
        if self._in_stages:
            self._expected[id(results)] = {
                key: Part.of(meta, value, 1).neutral() for key, (meta, value) in reduced.items() if value is not None
            }
        for key, (meta, value) in reduced.items():
            metric = self._entry(results, key, meta)
            metric._forward_cache = value
            if metric.is_tensor and not meta.on_epoch:
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
            parts[key] = Part(
                metric.meta,
                metric.meta.reduce_fx.__name__ if metric.is_tensor else "metric",
                metric.value if metric.is_tensor else None,
                metric.cumulated_batch_size if metric.is_tensor and metric.meta.is_mean_reduction else 1,
            )
        self._of_epoch[id(results)] -= valid
        gathers = []
        for key, (meta, reduced) in self._jointly(parts).items():
            metric = self._entry(results, key, meta)
            self._unknown -= set(results._forked_name(metric, on_step=False))
            metric.__dict__["_computed"] = reduced
            if reduced is None:
                gathers.append(metric)
        if gathers:
            assert self.group is not None
            align_states([metric.value for metric in gathers], self.group)
        for metric in gathers:
            metric.compute()

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
