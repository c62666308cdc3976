"""What one rank decides of a training's course: all ranks do it, or all end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_dist.elastic import guard
from lightning_dist.parallel import Alone

LONGEST_WAIT = timedelta(minutes=2)
"""For the other ranks, where one leaves a step or an epoch that they may be in."""


class Course:
    """Keeps the ranks together where one of them stops, skips a step, or has no batch left.

    [Note: what is agreed]
    ``trainer.should_stop``, set anywhere on any rank, stops all ranks where it would stop one process. Lightning
    broadcasts before each batch whether rank 0 was told to end (a SIGTERM); that broadcast is replaced by an all-reduce
    of both after the batch, so a step costs what it did.

    Loaders that a user deals, of unknown or of different length, may end apart: where a rank has its last batch, the
    epoch ends for all. That is agreed on before the step, in an all-reduce that other loaders do not have.

    What has no collective to travel with is met about: a rank whose ``training_step`` returns None, or that leaves an
    epoch by ``StopIteration`` (``on_train_batch_start`` that returns -1), says so in the process group's store, and
    waits there for the others to say the same. They skip together, or that rank raises.

    Args:
        trainer: of the fit.
        parallel: what gradients are reduced by.
        device: of the collectives.
        timeout: of collectives; the wait for others is at most :data:`LONGEST_WAIT`.

    Communication: over the world, per batch one all-reduce of 8 bytes in place of a broadcast; the same once more
    around each epoch and validation.
    """

    def __init__(self, trainer: pl.Trainer, parallel: Alone, device: torch.device, timeout: timedelta) -> None:
        self.trainer, self._parallel, self._device = trainer, parallel, device
        self._longest_wait = min(timeout, LONGEST_WAIT)
        self._shadows: list[tuple[Any, str, Any]] = []
        self._end_apart = False
        """Whether the training loaders may end on some ranks before they do on others, as all ranks know."""
        self._told_to_end = False

    def attach(self) -> None:
        """Starts to agree. Works around private parts of Lightning, as seen in 2.6.6."""
        fit: Any = self.trainer.fit_loop
        epoch = fit.epoch_loop
        connector: Any = self.trainer._logger_connector
        self._shadow(fit, "run", partial(self._before, fit.run))
        self._shadow(fit, "on_run_start", partial(self._after, fit.on_run_start))
        self._shadow(fit, "on_advance_end", partial(self._after, fit.on_advance_end))
        self._shadow(epoch, "on_run_start", partial(self._begin_epoch, epoch.on_run_start))
        self._shadow(epoch.val_loop, "run", partial(self._after, epoch.val_loop.run))
        self._shadow(epoch, "_broadcast_sigterm_tensor", self._end_if_told)
        self._shadow(epoch, "advance", partial(self._advance, epoch.advance))
        self._shadow(connector, "on_batch_end", partial(self._on_batch_end, connector.on_batch_end))
        self._shadow(epoch.automatic_optimization, "_training_step", self._training_step)

    def detach(self) -> None:
        """Gives Lightning its methods back."""
        for owner, name, before in reversed(self._shadows):
            vars(owner).pop(name) if before is None else vars(owner).update({name: before})
        self._shadows.clear()

    def _shadow(self, owner: Any, name: str, method: Any) -> None:
        self._shadows.append((owner, name, vars(owner).get(name)))
        vars(owner)[name] = method

    # ------------------------------------------------------------------ stopping

    def _any(self, *decisions: bool) -> list[bool]:
        """Whether any rank says so, for each. One all-reduce over the world."""
        verdict = torch.tensor(decisions, dtype=torch.int32, device=self._device)
        dist.all_reduce(verdict, dist.ReduceOp.MAX)
        return [bool(number) for number in verdict.tolist()]

    def _agree(self) -> None:
        stop, self._told_to_end = self._any(self.trainer.should_stop, self.trainer.received_sigterm)
        self.trainer.should_stop = stop

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

    def _end_if_told(self) -> None:
        if self._told_to_end:
            with contextlib.suppress(RuntimeError):
                dist.barrier()
            raise SIGTERMException

    # ------------------------------------------------------------------ the end of an epoch

    def _begin_epoch(self, own: Callable[[Any], None], data_fetcher: Any) -> None:
        own(data_fetcher)
        self._agree()
        combined = self.trainer.fit_loop._combined_loader
        assert combined is not None
        length = sized_len(combined)
        dealt = all(data.deals_alike for data in self.trainer.strategy.resume.training_data)  # type: ignore[attr-defined]
        # as many on all ranks, or not known
        least, most = (-1, -1) if length is None else (-length, length)
        lengths = torch.tensor([least, most], device=self._device)
        if not dealt:
            dist.all_reduce(lengths, dist.ReduceOp.MAX)
        self._end_apart = not dealt and (length is None or int(lengths[0]) != -int(lengths[1]))

    def before_batch(self) -> None:
        """Called when a batch is there, before its step."""
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        if not self._end_apart:
            return
        (is_last,) = self._any(progress.is_last_batch)
        if is_last and not progress.is_last_batch:
            progress.is_last_batch = True
            rank_zero_warn(
                "the training loaders of the ranks have different numbers of batches, so this epoch ends where the "
                "first of them does; deal the samples so that each rank has as many"
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

    # ------------------------------------------------------------------ steps without a loss

    def _training_step(self, kwargs: Any) -> ClosureResult:
        """Stands for Lightning's method of this name, which refuses None over several processes (seen in 2.6.6)."""
        trainer = self.trainer
        output = call._call_strategy_hook(trainer, "training_step", *kwargs.values())
        trainer.strategy.post_training_step()
        if output is None:
            self._meet(
                "step",
                "training_step returned None on this rank, to skip the batch, and not on others",
                "return a loss of zero that depends on the parameters (0 * loss), or decide it alike on all ranks",
            )
            self._parallel.skip_backward(trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches > 0)
        return ClosureResult.from_training_step_output(output, trainer.accumulate_grad_batches)

    # ------------------------------------------------------------------ meeting

    def _meet(self, place: str, what: str, instead: str) -> None:
        """Waits until all ranks are at this place.

        Raises:
            RuntimeError: some have not come in time.
        """
        store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
        place = f"lightning_dist/{place}/{guard.number_of_run()}"
        number = store.add(f"{place}/{rank}", 1)
        keys = [f"{place}/{number}/{other}" for other in range(dist.get_world_size())]
        store.set(keys[rank], "1")
        try:
            store.wait(keys, self._longest_wait)
        except RuntimeError:
            absent = [other for other, key in enumerate(keys) if not store.check([key])]
            message = (
                f"{what}: ranks {', '.join(map(str, absent))} did not do so within "
                f"{self._longest_wait.total_seconds():g} s of rank {rank}. Each would wait for the others for good; "
                f"{instead}"
            )
            guard.say_why(store, message)
            raise RuntimeError(message) from None
