"""A run that is told to leave, on any of its ranks, leaves on all of them where it can be gone on with exactly."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dist.compat import lightning as private
from lightning_dist.compat.distributed import default_store
from lightning_dist.elastic import guard
from lightning_dist.elastic.attempt import Attempt
from lightning_dist.elastic.requeue import requeue_slurm_job
from lightning_dist.elastic.signals import REQUEUE_STATUS, Asked, LeaveSignals
from lightning_dist.elastic.stop_point import StopPoint
from lightning_dist.patches import Patches
from lightning_dist.random_states import RandomStates
from lightning_dist.ranks import LayoutRanks
from lightning_dist.trainer.hpc_checkpoints import HpcCheckpoints
from lightning_dist.trainer.resume import Resume
from lightning_dist.trainer.resume_entry import Place
from lightning_dist.trainer.steps import Steps
from lightning_dist.tuning import Tuning

MaxTime = str | timedelta | dict[str, int] | None

PATIENCE = 5.0
"""Seconds from a signal within which a step that accumulates gradients may become whole; else they are left."""
_URGENT = 3
_SET_UP = ("pre_setup", "post_setup", "run-stage")
"""Lightning's barriers of a run whose loops have not begun (seen in 2.6.6)."""


class Preemption:
    """Signals and a deadline, noted when they come, agreed on by all ranks, and answered at the next place where a run
    can leave.

    [Note: where a preempted run leaves]
    Between two training batches, where the ranks have agreed on it after the batch: that travels in the all-reduce that
    they have there anyway, see :class:`ControlFlow`. Before a validation that was due then. Within an evaluation after
    the same batch on all ranks, see [Note: how a common batch is found]; a validation of a fit is begun again by the
    next start. In the set-up at one of Lightning's barriers, without a checkpoint. Between two epochs it leaves after
    the first batch of the next. A training that ends anyway, by ``should_stop`` or ``max_steps``, is saved and ends.
    Where gradients add up, it leaves after the step, or after :data:`PATIENCE` as the last step left it.

    It leaves by Lightning's ``SIGTERMException``, with :data:`REQUEUE_STATUS`; callbacks see it in ``on_exception``.

    Args:
        max_time: after which a start of the run is preempted, counted from when this is made; None: never.
    """

    def __init__(
        self,
        ranks: LayoutRanks,
        resume: Resume,
        hpc: HpcCheckpoints,
        steps: Steps,
        tuning: Tuning,
        max_time: MaxTime = None,
    ) -> None:
        self._ranks, self._resume, self._hpc, self._steps, self._tuning = ranks, resume, hpc, steps, tuning
        remaining = Timer(duration=max_time).time_remaining()
        self._deadline = None if remaining is None else time.time() + remaining
        self._signals = LeaveSignals()
        self._trainer: Any = None
        self._asked_at: float | None = None
        self._told, self._is_urgent = Asked.NOTHING, False
        """What all ranks know that some rank was asked; and whether that was :data:`PATIENCE` ago."""
        self._random: RandomStates | None = None
        """Before the validation that runs."""
        self._evaluations, self._evaluated = 0, 0
        """Evaluations of this run, and batches of the current one that are done."""
        self._stop_point: StopPoint | None = None
        self._ends_anyway = False
        """Whether the fit was saved in its last validation, and goes on to its end."""

    def begin(self, trainer: pl.Trainer, patches: Patches) -> None:
        """A run begins: from here on signals are noted. Lightning's own handlers, which communicate, are left out."""
        self._trainer, self._told, self._evaluations, self._ends_anyway = trainer, Asked.NOTHING, 0, False
        self._asked_at = None
        environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
        meanings: dict[int, Asked] = {signal.SIGTERM: Asked.LEAVE}
        requeue = getattr(signal, "SIGUSR1", None)
        if isinstance(environment, SLURMEnvironment):
            requeue = environment.requeue_signal if environment.auto_requeue else None
        if requeue is not None:
            meanings[requeue] = Asked.REQUEUE
        private.set_received_sigterm(trainer, False)
        patches.set(private.signal_connector(trainer), "register_signal_handlers", lambda: None)
        self._signals.listen(meanings)
        patches.also(self._signals.stop)

    @property
    def asked(self) -> int:
        """What this rank itself was asked by now; where that is urgent, so much more."""
        asked = self._signals.noted
        if self._deadline is not None and time.time() >= self._deadline:
            asked = Asked.REQUEUE
        if not asked:
            return asked
        self._asked_at = self._asked_at or time.monotonic()
        return asked + _URGENT * (time.monotonic() - self._asked_at > PATIENCE)

    def agreed(self, asked: int) -> None:
        """Takes the largest that any rank was asked."""
        self._told, self._is_urgent = Asked(asked % _URGENT), asked >= _URGENT

    def attach(self, trainer: pl.Trainer, patches: Patches) -> None:
        """The loops are about to begin; before others wrap them, who agree around them."""
        if trainer.state.fn != TrainerFn.FITTING:
            for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
                patches.wrap(loop, "run", self._evaluate)
                patches.wrap(loop, private.batch_method(loop), partial(self._evaluation_batch, loop))
            return
        self._hpc.begin_training()
        fit: Any = trainer.fit_loop
        epoch, validation = fit.epoch_loop, fit.epoch_loop.val_loop
        patches.wrap(fit, "run", self._fit)
        patches.wrap(epoch, "advance", self._advance)
        patches.wrap(validation, "run", self._validate)
        patches.wrap(validation, private.batch_method(validation), partial(self._evaluation_batch, validation))
        if self._ranks.world_size == 1:
            patches.wrap(private.logger_connector(trainer), "on_batch_end", self._on_batch_end_alone)

    # Before the loops

    def at_barrier(self, name: str | None) -> None:
        """Before a barrier of the set-up: leaves if any rank was asked to. One all-reduce of a number."""
        if name not in _SET_UP:
            return
        self._agree()
        if self._told:
            self._leave(None)

    def _agree(self) -> None:
        asked = torch.tensor(self.asked, device=self._ranks.device)
        if dist.is_initialized():
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        self.agreed(int(asked))

    def _fit(self, own: Callable[[], None]) -> None:
        if self._ranks.world_size == 1:
            self.agreed(self.asked)
        if self._told:
            self._leave(None)
        own()
        if not self._tuning.is_searching:
            self._hpc.fit_ended()

    # Training

    def _on_batch_end_alone(self, own: Callable[[], None]) -> None:
        if self._trainer.training:
            self.agreed(self.asked)
        own()

    def _advance(self, own: Callable[[Any], None], data_fetcher: Any) -> None:
        """Wraps Lightning's method that trains on a batch. A run that goes on begins where :meth:`_leave` left it."""
        fit = self._trainer.fit_loop
        if (goes_on := self._resume.take_place()) is not None:
            place, logged = goes_on
            private.end_restart(fit)
            self._steps.restore_logged(logged)
            if place == Place.VALIDATION:
                return
        elif self._told and self._is_at_step(fit.epoch_loop):
            self._leave(Place.BATCH)
        self._hpc.before_batch()
        own(data_fetcher)

    def _is_at_step(self, epoch: Any) -> bool:
        """Whether a step of this epoch is whole, or that would take too long."""
        return epoch.batch_progress.current.ready and (self._is_urgent or not private.accumulates(self._trainer))

    # Evaluation

    def _validate(self, own: Callable[[], Any]) -> Any:
        """Wraps the validations of a fit, that before the training included."""
        self._random = RandomStates.now(self._ranks.device)
        if self._told and not self._trainer.sanity_checking:
            self._leave_validation()
        return self._evaluate(own)

    def _leave_validation(self) -> None:
        trainer, epoch = self._trainer, self._trainer.fit_loop.epoch_loop
        self._ends_anyway = trainer.should_stop or 0 <= epoch.max_steps <= trainer.global_step
        if self._ends_anyway:
            self._hpc.save(Place.VALIDATION, self._random)
        else:
            self._leave(None if trainer.sanity_checking else Place.VALIDATION)

    def _evaluate(self, own: Callable[[], Any]) -> Any:
        self._evaluations, self._evaluated = self._evaluations + 1, 0
        if self._ranks.world_size > 1:
            key = f"lightning_dist/preempted/{guard.number_of_run()}/{self._evaluations}"
            self._stop_point = StopPoint(default_store(), key, dist.get_rank(), dist.get_world_size())
        return own()

    def _evaluation_batch(self, loop: Any, own: Callable[..., Any], *args: Any) -> Any:
        result = own(*args)
        self._evaluated += 1
        if not self._ends_anyway and self._stops(private.is_last_evaluated(loop)):
            if self._trainer.state.fn == TrainerFn.FITTING:
                self._leave_validation()
            else:
                self._leave(None)
        return result

    def _stops(self, is_last: bool) -> bool:
        if self._stop_point is None:
            return bool(self.asked) and not is_last
        return self._stop_point.is_reached(self._evaluated, is_last, bool(self.asked))

    def _leave(self, place: Place | None) -> None:
        """Saves, where there is a place to go on from, and ends the run on all ranks. Beside that, one all-reduce."""
        self._agree()
        path = None
        if place is not None and not self._tuning.is_searching:
            path = self._hpc.save(place, self._random if place == Place.VALIDATION else None)
        step = self._trainer.global_step
        if (attempt := Attempt.current()) is not None:
            attempt.record("preempted", path=path, step=step)
        private.set_received_sigterm(self._trainer, True)
        private.stop_observing_processes()
        rank_zero_info(f"Preempted after step {step}: {f'saved {path}' if path else 'nothing to save'}")
        if self._told == Asked.REQUEUE and self._ranks.rank == 0:
            requeue_slurm_job()
        raise SIGTERMException(REQUEUE_STATUS)
