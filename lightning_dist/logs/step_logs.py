"""Between Lightning and its results: what a module logs becomes one value of all ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar
from torch.distributed.tensor import DTensor

from lightning_dist.compat import lightning as private
from lightning_dist.compat.lightning import TO_TENSOR, ResultCollection
from lightning_dist.data import DistributedBatches, DistributedStream
from lightning_dist.logs import readers
from lightning_dist.logs.code_scan import LOGS, READS
from lightning_dist.logs.metrics import RepeatedBatch, give_rows_a_dim, metrics_in
from lightning_dist.logs.results import NotedLogs, ReducedResults, collections_of, to_tensor, whole
from lightning_dist.patches import Patches


class StepLogs:
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
    - values of an evaluation step: at every batch, if the first one logged any, and if the loader was sharded over the
      ranks (the user's own may differ in length: their step values stay the rank's own).
    - values of an epoch: when its batches end, and again for what the hooks of its end logged, before callbacks and
      schedulers decide by it.

    A mean is weighted by batch size. A rank that did not log a name adds nothing to it and is given the value. A
    ``torchmetrics.Metric`` gathers its own state, in an order that the ranks agreed on; a rank that did not log it
    takes part; its step value, which torchmetrics computes of one rank's batch, becomes the mean over the ranks. Left
    to Lightning: ``rank_zero_only=True`` and ``sync_dist_group``.

    Communication over the data ranks, at each point: see :func:`~lightning_dist.logs.reductions.all_reduce_logged` and,
    where a metric was logged, :func:`~lightning_dist.logs.metrics.align_states`.

    Args:
        trainer: whose results are reduced, from :meth:`attach` until an undo.
        monitored: names by which schedulers and callbacks decide.
        group: the ranks that log different values: of other samples or other stages.
        hosts: the same, for tensors on the CPU.
        batches: this rank's of an evaluation loader, by its index; None for one that the strategy has not sharded.
        stage: where ranks run different stages of a step: this rank's place, and that of the last stage. Then each
            step's values are reduced, since a rank may have none of its own; and of a sum that every stage's hooks log
            alike, the last stage's counts.
        is_even: whether all data ranks have as many samples of a training batch.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        monitored: set[str],
        group: dist.ProcessGroup,
        hosts: dist.ProcessGroup,
        batches: Callable[[int], DistributedBatches | DistributedStream | None],
        stage: tuple[int, int] | None = None,
        is_even: Callable[[], bool] = lambda: False,
    ) -> None:
        self.trainer, self.monitored, self._group, self._batches_of = trainer, monitored, group, batches
        self._in_stages = stage is not None
        self._results = ReducedResults(trainer, group, hosts, self._in_stages)
        self._noted = NotedLogs(trainer, self._results, is_even, stage is not None and stage[0] != stage[1])
        self._batch_idx = -1
        self._batches: DistributedBatches | DistributedStream | None = None
        """This rank's of the evaluation loader that runs."""
        self._repeated: RepeatedBatch | None = None
        """The batch that runs, while it is one that another rank counts."""
        # what all ranks know alike:
        self._decides = self._early = False
        """Whether a step's value is monitored; whether values are read in places that no hook's begin announces."""
        self._syncs = self._hooks_sync = self._may_sync = self._hooks_may_sync = False
        """Whether a training step, or its hooks, log with ``sync_dist``; or may, by their code, in the first step."""
        self._unknown = monitored - {"None", "epoch", "step"}
        """Monitored names that nobody logged yet."""
        self._writes = True
        """Whether evaluation steps log values of their own."""
        self._thread = threading.get_ident()
        self._hooks: dict[str, frozenset[str]] = {}
        """What hooks do, by the names under which Lightning profiles them."""
        self._rendezvous = readers.Rendezvous(group)

    def attach(self, patches: Patches) -> None:
        """Starts to note and to reduce, until an undo.

        ``_LoggerConnector.on_batch_end``, ``epoch_end_reached`` and ``on_epoch_end`` are called on every rank before
        values are read; so are ``on_train_batch_end`` and ``on_train_epoch_end`` of callbacks that monitor, the latter
        after the module's own. The progress bar would compute an epoch's values on rank 0 alone. Every logged value
        passes ``_ResultCollection.update_metrics``, every hook the profiler, every read a property of the connector
        (seen in Lightning 2.6.6).

        Communication: see :class:`~lightning_dist.logs.readers.Readers`.
        """
        found = readers.Readers(self.trainer, self._group)
        self._hooks, self._early = found.hooks, found.within_steps
        self._may_sync, self._hooks_may_sync = found.may_sync, found.hooks_may_sync
        connector = private.logger_connector(self.trainer)
        patches.set(connector, "before_read", self._before_read)
        patches.also(lambda: setattr(connector, "__class__", private.LoggerConnector))
        connector.__class__ = readers.WatchedConnector
        patches.wrap(connector, "on_batch_start", self._on_batch_start)
        patches.wrap(connector, "on_batch_end", self._on_batch_end)
        patches.wrap(connector, "epoch_end_reached", self._epoch_end_reached)
        patches.wrap(connector, "on_epoch_end", self._on_epoch_end)
        patches.wrap(self.trainer.profiler, "profile", self._hook)  # type: ignore[attr-defined]
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            decides = isinstance(callback, (EarlyStopping, Checkpoint)) or getattr(callback, "monitor", None)
            if decides:
                patches.wrap(callback, "on_train_batch_end", self._monitor_step)
            if decides or isinstance(callback, ProgressBar):  # which reads on rank 0 only
                patches.wrap(callback, "on_train_epoch_end", self._on_epoch_end)
        for results in collections_of(self.trainer):
            self._noted.attach(results, patches)

    def note_epoch(self, keys: list[str]) -> None:
        """Of values of a training epoch that an earlier run logged."""
        self._results.of_epoch[id(private.results_of(self.trainer.fit_loop.epoch_loop))].update(keys)

    @property
    def repeats(self) -> bool:
        """Whether the evaluation batch that runs is one that another rank counts."""
        return self._repeated is not None

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """While it lasts, a step logs; outside of it, hooks do."""
        with self._noted.of_step():
            yield
        if private.results_of(self.trainer) is not None:
            self._step_ended()

    def _on_batch_start(self, own: Any, batch: Any, dataloader_idx: int | None = None) -> None:
        own(batch, dataloader_idx)
        self._noted.begin_batch()
        if not self.trainer.training:
            self._batch_idx += 1
            self._batches = self._batches_of(dataloader_idx or 0)
            if self._batches is not None and not self._batches.counts(self._batch_idx):
                self._repeated = RepeatedBatch(self.trainer)
                self._noted.counts = False

    def _on_batch_end(self, own: Any) -> None:
        if self._repeated is not None:
            self._repeated.undo()
        if not self.trainer.training:
            if self._batches is not None and (self._batch_idx == 0 or self._writes):
                self._writes = bool(self._results.reduce_step("end"))
            self._results.dirty = False
        elif self._ends_whole():
            self._look(self._results.reduce_step("end"))
            self._hooks_may_sync = False
        own()
        self._repeated = None
        self._noted.counts = True

    def _ends_whole(self) -> bool:
        """Whether a training step's values are reduced when its batch ends, alike on all ranks."""
        trainer: Any = self.trainer
        accumulates = private.accumulates(trainer) and trainer.lightning_module.automatic_optimization
        update = private.logger_connector(trainer).should_update_logs or bool(trainer.fast_dev_run)
        # after the last step, and the last before a validation, hooks and callbacks read its values
        last = private.is_last(trainer) or trainer.should_stop
        return (
            (update and not accumulates)
            or (self._in_stages and self._results.dirty)
            or self._decides
            or bool(self._unknown)
            or self._hooks_sync
            or self._hooks_may_sync
            or last
        )

    def _epoch_end_reached(self, own: Any) -> None:
        ran = private.has_batches(self.trainer)
        self._batch_idx = -1
        for metric in metrics_in(self.trainer.lightning_module):  # hooks may compute it by themselves
            give_rows_a_dim(metric)
        if ran and self._results.dirty:  # its last step was skipped
            self._look(self._results.reduce_step("end"))
        own()
        if ran:  # evaluation says it twice
            self._unknown -= self._results.reduce_epoch()

    def _on_epoch_end(self, own: Any, *args: Any) -> None:
        self._unknown -= self._results.reduce_epoch()
        own(*args)

    def _step_ended(self) -> None:
        """A step of the strategy ended, on all ranks; its hooks are still to come."""
        if not self.trainer.training and self._batches is None:
            return  # ranks may have another number of batches
        self._results.dirty = True
        if self._early or (self.trainer.training and (self._syncs or self._may_sync)):
            self._look(self._results.reduce_step("step"))
            self._may_sync &= not self.trainer.training
            return
        synced = [meta for meta in self._results.metas_of_step if meta.sync.should]
        if synced and self.trainer.training:
            self._meet(
                f"self.log({synced[0].name!r}, ..., sync_dist=True) was called on this rank, and not on all ranks; it "
                "reduces over all of them: call it on all, or without sync_dist"
            )

    def _hook(self, own: Any, action: str) -> Any:
        """Around each hook, on all ranks, under the name by which Lightning profiles it."""
        found = self._hooks.get(action)
        if found is None:
            return own(action)
        reads = READS in found or (readers.SHOWS in found and (self._hooks_sync or self._hooks_may_sync))
        if reads and self._results.dirty and (self.trainer.training or self._batches is not None):
            self._look(self._results.reduce_step(action))
        return self._logging(own(action)) if LOGS in found else own(action)

    @contextmanager
    def _logging(self, around: Any) -> Iterator[Any]:
        with around as value:
            yield value
        self._results.dirty = True

    def _before_read(self) -> None:
        """Somebody reads, maybe on this rank only."""
        if private.results_of(self.trainer) is None or not private.has_batches(self.trainer):
            return
        if threading.get_ident() != self._thread:
            return  # one that shows values now and then, while the ranks' own threads talk
        if self._noted.in_step and self._in_stages:
            readers.validate_finished(self.trainer.lightning_module)
            return
        is_whole = not (self._results.dirty or self._results.metas_of_step)
        if is_whole or not (self.trainer.training or self._batches is not None):
            return
        reader = readers.user_reads()
        if reader is not None:
            self._meet(readers.refusal(reader))
            self._early = True

    def _meet(self, refusal: str) -> None:
        self._rendezvous.wait_for_all(refusal)
        self._look(self._results.reduce_step("met"))

    def _monitor_step(self, own: Any, *args: Any) -> None:
        if self._decides or self._unknown:
            self._look(self._results.reduce_step("monitor"))
        own(*args)

    def _look(self, metas: list[private.Metadata]) -> None:
        if not self.trainer.training:
            return
        names = {name for meta in metas for name in (meta.name, meta.forked_name(on_step=True))}
        self._unknown -= names
        self._decides |= bool(names & self.monitored)
        for meta in metas:
            self._syncs |= meta.sync.should and meta.fx == "training_step"
            self._hooks_sync |= meta.sync.should and meta.fx != "training_step"


def attach_logs(
    trainer: pl.Trainer,
    patches: Patches,
    monitored: set[str],
    group: dist.ProcessGroup | None,
    hosts: dist.ProcessGroup | None,
    batches: Callable[[int], DistributedBatches | DistributedStream | None],
    stage: tuple[int, int] | None = None,
    is_even: Callable[[], bool] = lambda: False,
) -> StepLogs | None:
    """Makes what a module logs one value of all ranks, until an undo.

    Args:
        trainer: about to run, with its module set up.
        monitored, group, hosts, batches, stage, is_even: see :class:`StepLogs`; no groups for one process.

    Returns:
        None where one rank logs, or all log the same: then only numbers that ranks hold parts of are made whole.

    Communication: see :class:`StepLogs`.
    """
    module = trainer.lightning_module
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        patches.set(module, TO_TENSOR, partial(to_tensor, trainer.strategy.root_device))
    if group is None or hosts is None or dist.get_world_size(group) == 1:
        for results in collections_of(trainer):
            patches.set(results, "update_metrics", partial(_update_with_whole, results))
        return None
    logs = StepLogs(trainer, monitored, group, hosts, batches, stage, is_even)
    logs.attach(patches)
    return logs


def _update_with_whole(results: ResultCollection, key: str, value: Any, batch_size: int) -> None:
    """Communication: see :func:`whole`."""
    ResultCollection.update_metrics(results, key, whole(results, key, value), batch_size)
