"""What one rank decides of a training's control flow: all ranks do it, or all end."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_dist.compat import lightning as private
from lightning_dist.compat.distributed import default_store
from lightning_dist.elastic import guard
from lightning_dist.parallel import SingleProcessRunner
from lightning_dist.patches import Patches
from lightning_dist.ranks import LayoutRanks

LONGEST_WAIT = timedelta(minutes=2)
"""For the other ranks, where one leaves a step or an epoch that they may be in."""


class Told(Protocol):
    """What this rank was asked by signals and the clock, and takes what all ranks were."""

    @property
    def asked(self) -> int:
        """By this rank's own signals and clock; 0 for nothing."""

    def agreed(self, asked: int) -> None:
        """The largest of all ranks."""


class ControlFlow:
    """Keeps the ranks together where one of them stops, skips a step, or has no batch left.

    [Note: what is agreed]
    ``trainer.should_stop``, set anywhere on any rank, stops all ranks where it would stop one process. Lightning
    broadcasts before each batch whether rank 0 was told to end (a SIGTERM); that broadcast is replaced by an all-reduce
    of both after the batch, so a step costs what it did. What any rank was told goes to ``preemption``.

    Loaders that a user shards, of unknown or of different length, may end apart: where a rank has its last batch, the
    epoch ends for all. That is agreed on before the step, in an all-reduce that other loaders do not have.

    The hosts agree among themselves, see :attr:`LayoutRanks.hosts`: to read an answer of the devices they would wait
    for all that those were given.

    What has no collective to travel with is met about: a rank whose ``training_step`` returns None, or that leaves an
    epoch by ``StopIteration`` (``on_train_batch_start`` that returns -1), says so in the process group's store, and
    waits there for the others to say the same. They skip together, or that rank raises.

    ``is_even`` says whether every data rank has as many training batches, since the strategy shards them; the wait for
    others is at most the timeout of collectives, and :data:`LONGEST_WAIT`.

    Whether any rank has written a buffer that is not sent yet travels along; then all agree on which.

    Communication: between the hosts of the world, per batch one all-reduce of 12 bytes in place of a broadcast; the
    same once more around each epoch and validation. Where a buffer was written, see :meth:`WrittenBuffers.agree`.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        runner: SingleProcessRunner,
        ranks: LayoutRanks,
        is_even: Callable[[], bool],
        preemption: Told,
    ) -> None:
        self.trainer, self._runner, self._hosts, self._is_even = trainer, runner, ranks.hosts[0], is_even
        self._preemption = preemption
        self._longest_wait = min(ranks.timeout, LONGEST_WAIT)
        self._end_apart = False
        """Whether the training loaders may end on some ranks before they do on others, as all ranks know."""

    def attach(self, patches: Patches) -> None:
        """Starts to agree, until an undo."""
        fit: Any = self.trainer.fit_loop
        epoch = fit.epoch_loop
        patches.wrap(fit, "run", self._before)
        patches.wrap(fit, "on_run_start", self._after)
        patches.wrap(fit, "on_advance_end", self._after)
        patches.wrap(epoch, "on_run_start", self._begin_epoch)
        patches.wrap(epoch.val_loop, "run", self._after)
        patches.set(epoch, private.SIGTERM_BROADCAST, lambda: None)
        patches.wrap(epoch, "advance", self._advance)
        patches.wrap(private.logger_connector(self.trainer), "on_batch_end", self._on_batch_end)
        patches.set(epoch.automatic_optimization, private.AUTOMATIC_STEP, self._training_step)

    def _most(self, *numbers: int) -> list[int]:
        """The largest of any rank, of each. One all-reduce between the hosts of the world."""
        most = torch.tensor(numbers, dtype=torch.int32)
        dist.all_reduce(most, dist.ReduceOp.MAX, self._hosts)
        return most.tolist()

    def _agree(self) -> None:
        buffers = self._runner.buffers
        wrote = buffers is not None and bool(buffers.written())
        stop, told, written = self._most(self.trainer.should_stop, self._preemption.asked, wrote)
        self.trainer.should_stop = bool(stop)
        self._preemption.agreed(told)
        if written and buffers is not None:
            buffers.agree()

    def _before(self, own: Callable[..., Any], *args: Any) -> Any:
        self._agree()
        try:
            return own(*args)
        except BaseException:
            guard.say_it_leaves()
            raise

    def _after(self, own: Callable[..., Any], *args: Any) -> Any:
        result = own(*args)
        self._agree()
        return result

    def _on_batch_end(self, own: Callable[[], None]) -> None:
        """After the hooks of a batch; what is logged, and whether to validate, depends on ``should_stop``."""
        if self.trainer.training:
            self._agree()
        own()

    def _begin_epoch(self, own: Callable[[Any], None], data_fetcher: Any) -> None:
        own(data_fetcher)
        self._agree()
        self._end_apart = not self._is_even()
        if not self._end_apart:
            return
        length = sized_len(private.loaders_of(self.trainer.fit_loop))
        # as many on all ranks, or not known
        lengths = torch.tensor([-1, -1] if length is None else [-length, length])
        dist.all_reduce(lengths, dist.ReduceOp.MAX, self._hosts)
        self._end_apart = length is None or int(lengths[0]) != -int(lengths[1])

    def before_batch(self) -> None:
        """Called when a batch is there, before its step."""
        if not self._end_apart:
            return
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        (is_last,) = self._most(progress.is_last_batch)
        if is_last and not progress.is_last_batch:
            progress.is_last_batch = True
            rank_zero_warn(
                "the training loaders of the ranks have different numbers of batches, so this epoch ends where the "
                "first of them does; shard the samples so that each rank has as many"
            )

    def _advance(self, own: Callable[[Any], None], data_fetcher: Any) -> None:
        try:
            own(data_fetcher)
        except StopIteration:
            self._meet(
                "epoch",
                "this rank left an epoch that other ranks go on with (by StopIteration, by -1 from "
                "on_train_batch_start, or since its loader had fewer batches than it said)",
                "decide it alike on all ranks, by trainer.strategy.reduce_boolean_decision(...)",
            )
            raise

    def _training_step(self, kwargs: Any) -> ClosureResult:
        """In place of Lightning's method of this name, which refuses None over several processes (seen in 2.6.6)."""
        trainer = self.trainer
        output = private.call_training_step(trainer, *kwargs.values())
        trainer.strategy.post_training_step()
        if output is None:
            self._meet(
                "step",
                "training_step returned None on this rank, to skip the batch, and not on others",
                "return a loss of zero that depends on the parameters (0 * loss), or decide it alike on all ranks",
            )
            self._runner.skip_backward(trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches > 0)
        return ClosureResult.from_training_step_output(output, trainer.accumulate_grad_batches)

    def _meet(self, place: str, what: str, instead: str) -> None:
        """Waits until all ranks are at this place; raises a RuntimeError where some have not come in time."""
        store, rank = default_store(), dist.get_rank()
        place = f"lightning_dist/{place}/{guard.number_of_run()}"
        number = store.add(f"{place}/{rank}", 1)
        keys = [f"{place}/{number}/{other}" for other in range(dist.get_world_size())]
        store.set(keys[rank], "1")
        try:
            store.wait(keys, self._longest_wait)
        except RuntimeError:
            absent = [other for other, key in enumerate(keys) if not store.check([key])]
            seconds = self._longest_wait.total_seconds()
            message = (
                f"{what}: ranks {', '.join(map(str, absent))} did not do so within {seconds:g} s of rank {rank}. Each "
                f"would wait for the others for good; {instead}"
            )
            guard.say_why(store, message)
            raise RuntimeError(message) from None
