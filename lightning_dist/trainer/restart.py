"""A fit in a process that an agent started anew: it goes on from the newest state that its run wrote.

[Note: the parts of a restart]
``start`` and ``ended`` are recorded by the agent, ``up`` by a rank, and here, by the first rank of each machine:
``formed`` (there are process groups), ``loaded`` (a fit's first batch is about to be asked for, all is restored) and
``first_step`` (of an attempt). From these and the last step before, the time that a restart took is told in its parts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dist.checkpoint import locations
from lightning_dist.collectives import broadcast_object, gather_objects, global_rank, raise_on_all_ranks
from lightning_dist.compat import lightning as private
from lightning_dist.elastic.attempt import Attempt
from lightning_dist.elastic.downtime import Downtime
from lightning_dist.elastic.states import Fits, SavedState, newest_states, record_state, saved_states
from lightning_dist.patches import Patches


class Restart:
    """Knows whether this process may be started again; records what a later attempt needs, and goes on from it.

    ``is_searching`` tells whether one of Lightning's finders runs, whose checkpoints are none of the fit's;
    ``find_snapshot`` gives that in memory from which a fit of this number can go on, the same on all ranks.

    Communication, under an agent that starts ranks again: at the beginning of a fit one all-gather of pickled
    descriptions of checkpoints, one of verdicts and one broadcast; nothing in a step, at whose end 32 bytes
    are written to memory.
    """

    def __init__(
        self,
        is_searching: Callable[[], bool],
        find_snapshot: Callable[[pl.Trainer, Attempt, int], SavedState | None],
    ) -> None:
        self._is_searching, self._find_snapshot = is_searching, find_snapshot
        self._attempt: Attempt | None = None
        self._trainer: Any = None
        self._fit = -1
        self._progress: int | None = None
        self._step = 0
        self._is_first_of_machine = False
        self._states: list[SavedState] = []
        """From which the fit may go on, newest first."""

    def attach(self, trainer: pl.Trainer, patches: Patches) -> None:
        """A run begins, whose ranks have formed their process groups. Every rank calls it."""
        self._attempt, self._trainer, self._states = Attempt.current(), trainer, []
        if self._attempt is None or trainer.state.fn != TrainerFn.FITTING:
            return
        self._fit = Fits.begin()
        self._is_first_of_machine = os.environ.get("LOCAL_RANK", "0") == "0"
        self._record("formed")
        self._go_on(patches)
        if self._is_first_of_machine:
            self._progress = self._attempt.open_progress()
            patches.also(self._close)
        patches.wrap(trainer.fit_loop.epoch_loop, "advance", self._advance)

    def _record(self, event: str, **values: Any) -> None:
        if self._attempt is not None and self._is_first_of_machine:
            self._attempt.record(event, fit=self._fit, **values)

    def _go_on(self, patches: Patches) -> None:
        """Has the fit restore the newest state in place of what its caller says."""
        assert self._attempt is not None
        own: Any = [], {}
        if self._is_first_of_machine:
            own = saved_states(self._attempt, self._fit), self._folders()
        every = gather_objects(own)
        folders: dict[str, str] = {}
        for _, of_rank in every:
            folders |= of_rank
        for callback in self._callbacks():
            callback.dirpath = callback.dirpath or folders.get(callback.state_key)
        states = [state for states, _ in every for state in states]
        if (snapshot := self._find_snapshot(self._trainer, self._attempt, self._fit)) is not None:
            states.append(snapshot)
        found: list[SavedState] = []
        with raise_on_all_ranks("look for checkpoints of this run"):
            if global_rank() == 0:
                found = newest_states(states, self._is_there)
        self._states = broadcast_object(found)
        if self._states:
            patches.wrap(private.checkpoint_connector(self._trainer), "resume_start", self._resume)

    def older_than(self, path: Any) -> list[str]:
        """Other checkpoints to go on from where that of a restart is damaged, newest first."""
        paths = [state.path for state in self._states]
        return paths[1:] if paths and str(path) == paths[0] else []

    def _resume(self, original: Callable[..., None], *_: Any, **__: Any) -> None:
        """Wraps Lightning's method that reads the checkpoint of ``ckpt_path``. What the run itself wrote is trusted."""
        original(self._states[0].path, weights_only=False)

    def _is_there(self, path: str) -> bool:
        """What a ``CheckpointIO`` of the user's wrote is taken to be."""
        if type(self._trainer.strategy.checkpoint_io) is not TorchCheckpointIO:
            return True
        place = locations.resolve_swap(locations.as_path(path))
        return bool(place.exists())

    def _callbacks(self) -> list[Any]:
        return [callback for callback in self._trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]

    def _folders(self) -> dict[str, str]:
        """Where callbacks saved in this fit, by their keys: a logger's next version would have them begin anew, and
        forget the best of before.
        """
        assert self._attempt is not None
        told = [e for e in self._attempt.events() if e["event"] == "loaded" and e["fit"] == self._fit]
        return told[-1]["folders"] if told else {}

    def on_train_start(self) -> None:
        """All is restored, and hooks have run."""
        if self._attempt is None:
            return
        folders = {callback.state_key: str(callback.dirpath) for callback in self._callbacks() if callback.dirpath}
        self._step = self._trainer.global_step
        self._record("loaded", step=self._step, folders=folders)

    def _advance(self, original: Callable[..., None], *args: Any) -> None:
        """Wraps Lightning's method that trains on a batch."""
        original(*args)
        if (step := self._trainer.global_step) == self._step:
            return
        if self._progress is not None:
            assert self._attempt is not None
            self._attempt.note_progress(self._progress, self._fit, step)
            if not Fits.has_stepped:
                self._tell(step)
        self._step = step

    def _tell(self, step: int) -> None:
        """After the first step of an attempt: rank 0 says what the restart cost."""
        assert self._attempt is not None
        Fits.has_stepped = True
        self._record("first_step", step=step)
        if told := Downtime.of(self._attempt, self._fit, self._step):
            rank_zero_info(str(told))

    def _close(self) -> None:
        descriptor, self._progress = self._progress, None
        if descriptor is not None:
            os.close(descriptor)

    def recorder(self, path: Any, checkpoint: dict[str, Any]) -> Callable[[], None] | None:
        """What a rank does when this checkpoint is complete; None where nothing would go on from it."""
        if self._attempt is None or self._trainer.state.fn != TrainerFn.FITTING:
            return None
        if self._is_searching() or not {"optimizer_states", "loops"} <= checkpoint.keys():
            return None
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
        return partial(record_state, self._attempt, self._fit, path, checkpoint["global_step"], batches, time.time())
