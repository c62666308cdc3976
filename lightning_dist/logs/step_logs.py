"""Between Lightning and its results: what a module logs becomes one value of all ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _Sync,
)
from torch.distributed.tensor import DTensor

from lightning_dist.data import DealtBatches, DealtStream
from lightning_dist.logs.mentions import LOGS, READS
from lightning_dist.logs.metrics import give_rows_a_dim, metrics_in
from lightning_dist.logs.readers import (
    SHOWS,
    Meeting,
    Readers,
    WatchedConnector,
    refusal,
    refuse_unfinished,
    told,
    user_reads,
)
from lightning_dist.logs.results import JointResults
from lightning_dist.logs.uncounted import Uncounted
from lightning_dist.logs.values import TO_TENSOR, first_batch_size, to_tensor, update_with_whole, whole

NEUTRAL = {"mean": 0.0, "sum": 0.0, "min": float("inf"), "max": float("-inf")}
"""What a step logs that is not counted, by reduction."""


class StepLogs(JointResults):
    """Makes what the data ranks log one value, in steps and in every other hook.

    [Note: what a module logs is reduced jointly]
    A module written for one process logs without ``sync_dist``. Over several data ranks Lightning then keeps each
    rank's own value: the logged mean is that of rank 0's samples, and schedulers and callbacks that monitor it decide
    apart. With ``sync_dist`` it reduces value by value as they are logged, so ranks that log other names, or in
    another order, mix them or wait for ever. Here ``log`` only notes, and the ranks reduce all values at once, in
    float64, at points that every rank passes:

    - values of a step: when its batch ends, if the loggers write it (``log_every_n_steps``), or a validation or the end
      of the epoch follows. Between those a value stays the rank's own, where only the progress bar shows it. If a
      scheduler or callback monitors a training step's value, or names its file by it: at every step, before callbacks
      read it. Until all monitored names were seen once, every step is looked at.
    - values with ``sync_dist=True``: at every step, when ``training_step`` ends, or, of a hook, before readers.
    - values that the user's own code reads while steps run: before the hook of which the code says that it reads, on
      all ranks, so that also rank 0 may read alone. A read that was not foreseen waits for the others to read too, and
      from then on every step ends with whole values; one that only some ranks make is refused.
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
        dealt: Callable[[int], DealtBatches | DealtStream | None] = lambda _: None,
        stage: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(trainer, group, in_stages=stage is not None)
        self.monitored, self._dealt_by_loader = monitored, dealt
        self._repeats = stage is not None and stage[0] != stage[1]
        self._of_step_now = False
        self._shadows: list[tuple[Any, str, Any]] = []
        self._batch_idx = -1
        self._size: int | None = None
        self._is_given = False
        """Of the batch, once a step's value was weighted by it."""
        self._dealt: DealtBatches | DealtStream | None = None
        """Of the evaluation loader that runs."""
        self._kept: Uncounted | None = None
        """How things stood, while the batch is one that another rank counts."""
        self._decides = False
        """Whether a step's value is monitored, as all ranks know."""
        self._early = False
        """Whether values are read in places that no hook's begin announces, as all ranks know."""
        self._syncs, self._hooks_sync = False, False
        """Whether a training step, or its hooks, log with ``sync_dist``, as all ranks know."""
        self._may_sync, self._hooks_may_sync = False, False
        """Whether their code says so, until the first step shows it."""
        self._thread = threading.get_ident()
        self._readers: Readers | None = None
        self._meeting: Meeting | None = None
        self._unknown = monitored - {"None", "epoch", "step"}
        """Monitored names that nobody logged yet, as all ranks know."""
        self._writes = True
        """Whether evaluation steps log values of their own, as all ranks know."""

    # ------------------------------------------------------------------ between Lightning and its results

    def attach(self) -> None:
        """Starts to note and to reduce. Works around private parts of Lightning, as seen in 2.6.6.

        ``_LoggerConnector.on_batch_end``, ``epoch_end_reached`` and ``on_epoch_end`` are called on every rank before
        values are read; so are ``on_train_batch_end`` and ``on_train_epoch_end`` of callbacks that monitor, the latter
        after the module's own. The progress bar would compute an epoch's values on rank 0 alone. Every logged value
        passes ``_ResultCollection.update_metrics``, every hook the profiler, every read a property of the connector.

        Communication: see :class:`~lightning_dist.logs.readers.Readers`.
        """
        fitting = self.trainer.fit_loop.epoch_loop
        loops = (fitting, fitting.val_loop, self.trainer.validate_loop, self.trainer.test_loop)
        module = self.trainer.lightning_module
        if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            self._shadow(module, TO_TENSOR, partial(to_tensor, self.trainer.strategy.root_device))
        if self.group is None or dist.get_world_size(self.group) == 1:
            for loop in loops:
                self._shadow(loop._results, "update_metrics", partial(update_with_whole, loop._results))
            return
        connector = self.trainer._logger_connector
        self._readers, self._meeting = Readers(self.trainer, self.group), Meeting(self.group)
        self._early = self._readers.within_steps
        self._may_sync, self._hooks_may_sync = self._readers.may_sync, self._readers.hooks_may_sync
        self._shadow(connector, "_before_read", self._before_read)
        profiler: Any = self.trainer.profiler  # type: ignore[attr-defined]
        self._shadow(profiler, "profile", partial(self._hook, profiler.profile))
        connector.__class__ = WatchedConnector
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
        for loop in loops:
            results = loop._results
            self._of_step[id(results)], self._of_epoch[id(results)] = {}, set()
            self._shadow(results, "update_metrics", partial(self._update_metrics, results))
            self._shadow(results, "_extract_batch_size", partial(self._batch_size, results))

    @property
    def repeats(self) -> bool:
        """Whether the evaluation batch that runs is one that another rank counts."""
        return self._kept is not None

    def detach(self) -> None:
        """Gives Lightning its methods back."""
        for owner, name, before in reversed(self._shadows):
            vars(owner).pop(name) if before is None else vars(owner).update({name: before})
        self._shadows.clear()
        connector: Any = self.trainer._logger_connector
        if isinstance(connector, WatchedConnector):
            connector.__class__ = _LoggerConnector  # type: ignore[assignment]

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """While it lasts, a step logs; outside of it, hooks do."""
        self._of_step_now = True
        try:
            yield
        finally:
            self._of_step_now = False
        if self._readers is not None and self.trainer._results is not None:
            self._step_ended()

    def _shadow(self, owner: Any, name: str, method: Any) -> None:
        self._shadows.append((owner, name, vars(owner).get(name)))
        vars(owner)[name] = method

    def _batch_size(self, results: _ResultCollection, value: Any, batch_size: int | None, meta: _Metadata) -> int:
        # Lightning weights a step's value by whatever another `log` of this rank's batch found
        self._is_given = batch_size is not None
        if batch_size is None and not (value.is_tensor and meta.on_epoch):
            if self._size is None:
                self._size = first_batch_size(results.batch)
            return self._size
        return _ResultCollection._extract_batch_size(results, value, batch_size, meta)

    def _update_metrics(self, results: _ResultCollection, key: str, value: Any, batch_size: int) -> None:
        metric = results[key]
        value = whole(results, key, value)
        if value is None:
            return
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
            # parts of a batch that were dealt evenly count alike, whatever Lightning takes for their size
            alike = self.trainer.training and not self._is_given and self._deals_alike
            self._of_step[id(results)][key] = min(batch_size, 1) if alike else batch_size
        if metric.meta.on_epoch:
            self._of_epoch[id(results)].add(key)

    @property
    def _deals_alike(self) -> bool:
        strategy: Any = self.trainer.strategy
        return all(data.deals_alike for data in strategy.resume.training_data)

    def _on_batch_start(self, own: Any, batch: Any, dataloader_idx: int | None = None) -> None:
        own(batch, dataloader_idx)
        self._size = None
        if not self.trainer.training:
            self._batch_idx += 1
            self._dealt = self._dealt_by_loader(dataloader_idx or 0)
            if self._dealt is not None and not self._dealt.counts(self._batch_idx):
                self._kept = Uncounted(self.trainer)

    def _on_batch_end(self, own: Any) -> None:
        if self._kept is not None:
            self._kept.put_back()
        if not self.trainer.training:
            if self._dealt is not None and (self._batch_idx == 0 or self._writes):
                self._writes = bool(self._reduce_step("end"))
            self._dirty = False
        elif self._ends_whole():
            self._look(self._reduce_step("end"))
            self._hooks_may_sync = False
        own()
        self._kept = None

    def _ends_whole(self) -> bool:
        """Whether a training step's values are reduced when its batch ends, alike on all ranks."""
        trainer: Any = self.trainer
        fit = trainer.fit_loop
        accumulates = fit._should_accumulate() and trainer.lightning_module.automatic_optimization
        update = trainer._logger_connector.should_update_logs or bool(trainer.fast_dev_run)
        # after the last step, and the last before a validation, hooks and callbacks read its values
        last = fit.epoch_loop._is_training_done or trainer.should_stop
        timed = trainer._val_check_time_interval is not None  # by the clock of each rank
        assert fit._data_fetcher is not None
        return (
            (update and not accumulates)
            or (self._in_stages and self._dirty)
            or self._decides
            or bool(self._unknown)
            or self._hooks_sync
            or self._hooks_may_sync
            or last
            or (not timed and fit.epoch_loop._should_check_val_fx(fit._data_fetcher))
        )

    def _epoch_end_reached(self, own: Any) -> None:
        connector = self.trainer._logger_connector
        ran = connector._first_loop_iter is not None
        self._batch_idx = -1
        for metric in metrics_in(self.trainer.lightning_module):  # hooks may compute it by themselves
            give_rows_a_dim(metric)
        if ran and self._dirty:  # its last step was skipped
            self._look(self._reduce_step("end"))
        own()
        if ran:  # evaluation says it twice
            self._unknown -= self._reduce_epoch()

    def _on_epoch_end(self, own: Any) -> None:
        self._unknown -= self._reduce_epoch()
        own()

    def _on_train_epoch_end(self, own: Any, *args: Any) -> None:
        self._unknown -= self._reduce_epoch()
        own(*args)

    # ------------------------------------------------------------------ readers while steps run

    def _step_ended(self) -> None:
        """A step of the strategy ended, on all ranks; its hooks are still to come."""
        if not self.trainer.training and self._dealt is None:
            return  # ranks may have another number of batches
        self._dirty = True
        if self._early or (self.trainer.training and (self._syncs or self._may_sync)):
            self._look(self._reduce_step("step"))
            self._may_sync &= not self.trainer.training
            return
        results = self.trainer._results
        assert results is not None
        synced = [results[key].meta for key in self._of_step[id(results)] if results[key].meta.sync.should]
        if synced and self.trainer.training:
            self._meet(
                f"self.log({synced[0].name!r}, ..., sync_dist=True) was called on this rank, and not on all ranks; it "
                "reduces over all of them: call it on all, or without sync_dist"
            )

    def _hook(self, own: Any, action: str) -> Any:
        """Around each hook, on all ranks, under the name by which Lightning profiles it."""
        assert self._readers is not None
        found = self._readers.hooks.get(action)
        if found is None:
            return own(action)
        reads = READS in found or (SHOWS in found and (self._hooks_sync or self._hooks_may_sync))
        if reads and self._dirty and (self.trainer.training or self._dealt is not None):
            self._look(self._reduce_step(action))
        return told(own(action), self._hook_logged) if LOGS in found else own(action)

    def _hook_logged(self) -> None:
        self._dirty = True

    def _before_read(self) -> None:
        """Somebody reads, maybe on this rank only."""
        results = self.trainer._results
        if results is None or self.trainer._logger_connector._first_loop_iter is None:
            return
        if threading.get_ident() != self._thread:
            return  # one that shows values now and then, while the ranks' own threads talk
        if self._of_step_now and self._in_stages:
            refuse_unfinished(self.trainer.lightning_module)
            return
        if not (self._dirty or self._of_step[id(results)]) or not (self.trainer.training or self._dealt is not None):
            return
        reader = user_reads()
        if reader is not None:
            self._meet(refusal(reader))
            self._early = True

    def _meet(self, refusal: str) -> None:
        assert self._meeting is not None
        self._meeting.wait_for_all(refusal)
        self._look(self._reduce_step("met"))

    def _monitor_step(self, own: Any, *args: Any) -> None:
        if self._decides or self._unknown:
            self._look(self._reduce_step("monitor"))
        own(*args)

    def _look(self, metas: list[_Metadata]) -> None:
        if not self.trainer.training:
            return
        names = {name for meta in metas for name in (meta.name, meta.forked_name(on_step=True))}
        self._unknown -= names
        self._decides |= bool(names & self.monitored)
        for meta in metas:
            self._syncs |= meta.sync.should and meta.fx == "training_step"
            self._hooks_sync |= meta.sync.should and meta.fx != "training_step"
