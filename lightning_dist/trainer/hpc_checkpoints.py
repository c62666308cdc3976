"""The checkpoint of a preempted fit: saved, gone on from by the next start, and removed when that has ended."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_dist.checkpoint import hpc_files
from lightning_dist.collectives import broadcast_object, raise_on_all_ranks
from lightning_dist.compat import lightning as private
from lightning_dist.patches import Patches
from lightning_dist.random_states import RandomStates
from lightning_dist.ranks import LayoutRanks
from lightning_dist.trainer.checkpoints import Checkpoints
from lightning_dist.trainer.resume import Resume
from lightning_dist.trainer.resume_entry import Place
from lightning_dist.trainer.steps import Steps


class HpcCheckpoints:
    """What a preempted fit leaves, and goes on from on its own; see :mod:`lightning_dist.checkpoint.hpc_files`."""

    def __init__(self, ranks: LayoutRanks, resume: Resume, checkpoints: Checkpoints, steps: Steps) -> None:
        self._ranks, self._resume, self._checkpoints, self._steps = ranks, resume, checkpoints, steps
        self._trainer: Any = None
        self._fit: hpc_files.Fit | None = None
        self._used: str | None = None
        """That which this fit goes on from, or has left last."""
        self._first_step = 0
        """Optimizer steps that were done before this run."""
        self._logged_at_step: dict[str, Any] = {}
        """Where gradients of several batches add up, what the epoch had logged at the last step."""

    def attach(self, trainer: pl.Trainer, patches: Patches) -> None:
        """A run begins. A fit goes on from what an earlier start of the same script left, if it left one."""
        self._trainer, self._used, self._first_step = trainer, None, 0
        if trainer.state.fn == TrainerFn.FITTING:
            self._fit = hpc_files.Fit.next_of(trainer.lightning_module)
            patches.wrap(private.checkpoint_connector(trainer), "resume_start", self._resume_start)

    def _resume_start(self, own: Callable[..., None], path: Any = None, weights_only: bool | None = None) -> None:
        """Wraps Lightning's method that loads what a run goes on from. One broadcast of a name."""
        found = self._find()
        if found is not None and (path is None or str(path) == found or hpc_files.is_older(path, found)):
            rank_zero_info(f"This fit was preempted, and goes on from {found}")
            self._used = path = found
        own(path, weights_only)

    def _find(self) -> str | None:
        found = None
        assert self._fit is not None
        with raise_on_all_ranks("look for the checkpoint of a preempted run"):
            if self._ranks.rank == 0:
                found = hpc_files.newest_of(self._folder, self._fit)
        return broadcast_object(found)

    @property
    def _folder(self) -> str:
        return str(self._trainer.default_root_dir)

    def begin_training(self) -> None:
        """What is to be gone on from has been loaded."""
        self._first_step = self._trainer.global_step

    def before_batch(self) -> None:
        """A batch is about to be asked for."""
        if self._trainer.accumulate_grad_batches > 1 and not private.accumulates(self._trainer):
            self._logged_at_step = self._steps.logged_here()

    def save(self, place: Place, random: RandomStates | None = None) -> str | None:
        """Saves on all ranks how the fit stands, and returns where; None where no step was done that is not saved.

        What the store does not take is a warning: what was saved before is left.
        """
        trainer = self._trainer
        if trainer.global_step == self._first_step or trainer.fast_dev_run:
            return None
        try:
            self._checkpoints.callback_saves.settle()
        except (OSError, RuntimeError) as error:
            rank_zero_warn(str(error))
        try:
            path = self._save(place, random)
        except (OSError, RuntimeError, ValueError) as error:
            rank_zero_warn(f"the preempted run could not be saved, earlier checkpoints are left: {error}")
            return None
        before, self._used = self._used, path
        self._remove(before)
        return path

    def _save(self, place: Place, random: RandomStates | None) -> str:
        path = ""
        with raise_on_all_ranks("name the checkpoint of a preempted run"):
            if self._ranks.rank == 0:
                path = hpc_files.next_path(self._folder)
        path = broadcast_object(path)
        here = self._logged_at_step if self._resume.since_step else self._steps.logged_here()
        with self._resume.saving_at(place, random, self._steps.gather_logged(here)):
            self._trainer.save_checkpoint(path)
        self._checkpoints.saves.wait()
        assert self._fit is not None
        with raise_on_all_ranks(f"label {path}"):
            if self._ranks.rank == 0:
                hpc_files.label(path, self._fit)
        return path

    def fit_ended(self) -> None:
        """The fit has ended by itself: what it went on from is not needed any more."""
        used, self._used = self._used, None
        self._remove(used)

    def _remove(self, path: str | None) -> None:
        if path is not None and self._ranks.rank == 0:
            self._checkpoints.saves.afterwards(partial(hpc_files.remove_label, path))
            self._checkpoints.remove(path)
