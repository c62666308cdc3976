"""Lightning's finders of a batch size and of a learning rate over ranks, which come to the same answer.

[Note: what a finder does]
It saves a checkpoint under a name of its own, runs the loop for some steps with callbacks of its own, goes back to the
checkpoint and removes it (``tuner/batch_size_scaling.py``, ``tuner/lr_finder.py``; seen in Lightning 2.6.6). So a
search begins with the save and ends with the removal, whoever asked for it. While it lasts, ranks agree on the file
that they save to, on the loss that the finder sees, and on whether a step fits in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor

from lightning_dist import checkpoint as checkpoints
from lightning_dist.collectives import broadcast_object, gather_objects
from lightning_dist.compat import lightning as private
from lightning_dist.compat.distributed import num_collectives
from lightning_dist.data.sharding import distributed_sampler
from lightning_dist.parallel import DDPRunner, SingleProcessRunner
from lightning_dist.patches import Patches
from lightning_dist.random_states import RandomStates
from lightning_dist.ranks import LayoutRanks

_BATCH_SIZE, _LEARNING_RATE = ".scale_batch_size_", ".lr_find_"
"""How the names of the finders' checkpoints begin (seen in Lightning 2.6.6)."""
_PATIENCE = timedelta(minutes=2)
"""For ranks to tell whether a step fitted; those that wait for one that ran out of memory never do."""


class Tuning:
    """A run's search of a finder, while there is one: what the hooks of a strategy ask and tell."""

    def __init__(self, ranks: LayoutRanks) -> None:
        self.fits: Agreement | None = None
        """While a batch size is looked for over several ranks."""
        self._ranks, self._patches = ranks, Patches()
        self.is_searching = False
        """Whether a finder looks for its answer, from its save to its removal of the checkpoint."""
        self._position: Any = None

    def begin(self, path: Any, trainer: pl.Trainer, position: Any) -> Any:
        """A checkpoint is about to be saved: that of a finder, which draws another name on each rank, begins a search.

        ``position`` is that of the training, which :meth:`end` and :meth:`leave` give back. Returns where to save: of a
        finder the same on all ranks, by one broadcast over the world; for a batch size see also :class:`Agreement`.
        """
        kind = _kind_of_search(path)
        if kind is None:
            return path
        self.is_searching, self._kind, self._position = True, kind, position
        self._path: str = broadcast_object(str(path))
        self._random = RandomStates.now(self._ranks.device)
        self._trainer, self._loop = trainer, private.running_loop(trainer)
        if self._ranks.world_size > 1 and kind == _BATCH_SIZE:
            self.fits = Agreement(self._ranks)
            self._patches.wrap(self._loop, "setup_data", self._with_own_length)
        return self._path

    def path(self, path: Any) -> Any:
        """Where a checkpoint that is asked for is; see :meth:`begin`."""
        return self._path if self.is_searching else path

    def ends_with(self, path: Any) -> bool:
        """Whether the removal of this checkpoint ends the search."""
        return self.is_searching and _kind_of_search(path) is not None

    def end(self) -> Any:
        """After the removal. The trainer, its random generators and its data are as they were; see :meth:`begin`."""
        begins_data_again = self._kind == _BATCH_SIZE and self._loop is self._trainer.fit_loop
        position = self._stop()
        self._random.restore(self._ranks.device)
        if begins_data_again:  # as if nothing had been drawn; as the finder of a learning rate does itself
            private.forget_loaders(self._loop)
            self._loop.setup_data()
        return position

    def leave(self) -> Any:
        """After an exception that ended the finder before it went back to its checkpoint: removes that."""
        if self._ranks.rank == 0:
            checkpoints.remove(self._path)
        return self._stop()

    def _stop(self) -> Any:
        fits, position = self.fits, self._position
        self.is_searching, self.fits, self._position = False, None, None
        if fits is not None:
            fits.end()
        self._patches.undo()
        return position

    def apart(self, runner: SingleProcessRunner) -> AbstractContextManager[None]:
        """Around a backward pass: in a trial, whose weights are thrown away, no copy waits for another's gradients."""
        return runner.accumulating() if self.fits is not None and isinstance(runner, DDPRunner) else nullcontext()

    def raise_if_broken(self) -> None:
        """Before a barrier: raises where ranks are at different places, so that it would wait for good."""
        if self.fits is not None and self.fits.broken is not None:
            raise self.fits.broken

    def _with_own_length(self, set_up: Callable[[], None]) -> None:
        """Wraps Lightning's method: its finder stops at a batch of the whole data set, here of a rank's part."""
        set_up()
        combined = private.loaders_of(self._loop)
        if combined is None or private.DATASET_LENGTH in vars(combined):
            return
        if any(distributed_sampler(loader) is not None for loader in combined.flattened):
            num_parts = self._ranks.num_data_ranks
            self._patches.wrap(combined, private.DATASET_LENGTH, lambda whole: -(-whole() // num_parts))

    def watch_losses(self) -> None:
        """A training starts: the finder of a learning rate is to see the loss of the whole batch."""
        for callback in self._trainer.callbacks if self.is_searching else ():  # type: ignore[attr-defined]
            if isinstance(callback, private.LearningRateCallback) and "on_train_batch_end" not in vars(callback):
                self._patches.wrap(callback, "on_train_batch_end", self._with_mean_loss)

    def _with_mean_loss(self, own: Callable[..., None], trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        """Communication: one all-reduce of the loss over the data ranks."""
        if outputs:
            loss = outputs if isinstance(outputs, Tensor) else outputs["loss"]
            outputs = {"loss": self._ranks.reduce(loss.detach())}
        own(trainer, module, outputs, *args)


class Agreement:
    """Whether what every rank has just computed fitted in its memory; makes a process group of gloo to talk of that."""

    def __init__(self, ranks: LayoutRanks) -> None:
        self.broken: RuntimeError | None = None
        """Why ranks can't go on together."""
        self._ranks = ranks
        self._patience = min(_PATIENCE, ranks.timeout)
        self._group: Any = dist.new_group(backend="gloo", timeout=self._patience)

    @contextmanager
    def agreed(self, forget: Callable[[], None]) -> Iterator[None]:
        """An error that any rank meets inside is met by all; one for want of memory as Lightning's finder knows it.

        ``forget`` drops what is left of the step then. Raises a RuntimeError where ranks failed after different numbers
        of collectives, or one while others wait for it in one. One all-gather of a short object over that group.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        # how many collectives this rank has begun in each group
        begun = tuple(num_collectives(group) for group in self._ranks.groups.values())
        is_memory = error is not None and is_oom_error(error)
        verdict = (None if error is None else f"{type(error).__name__}: {error}", is_memory, begun)
        try:
            verdicts = gather_objects(verdict, self._group)
        except RuntimeError as silence:
            if error is None:
                raise
            raise self._break(
                f"rank {self._ranks.rank} met {verdict[0]}, and another rank gave no word of its step for "
                f"{self._patience.total_seconds():.0f} s: under {self._ranks.layout} it waits for this one inside of it"
            ) from silence
        failed = {rank: found for rank, found in enumerate(verdicts) if found[0] is not None}
        if not failed:
            return
        told = ", ".join(f"rank {rank} met {found[0]}" for rank, found in failed.items())
        if not all(found[1] for found in failed.values()):
            if error is not None and not any(found[1] for found in failed.values()) and len(failed) == len(verdicts):
                raise error
            raise self._break(told) from error
        if len({found[2] for found in verdicts}) > 1:
            raise self._break(f"{told}, at another place of its step than other ranks") from error
        forget()
        # in words that Lightning's is_oom_error knows
        raise error if error is not None else RuntimeError(f"CUDA out of memory on another rank: {told}")

    def _break(self, told: str) -> RuntimeError:
        self.broken = RuntimeError(
            f"the search for a batch size can't go on: {told}. Give the finder a max_val= below the size that failed, "
            "or look for the size with dp_replicate alone"
        )
        return self.broken

    def end(self) -> None:
        """Gives the process group up."""
        if self.broken is None:
            dist.destroy_process_group(self._group)


def _kind_of_search(path: Any) -> str | None:
    name = os.path.basename(str(path))
    return next((kind for kind in (_BATCH_SIZE, _LEARNING_RATE) if name.startswith(kind)), None)


def validate_tuner(trainer: pl.Trainer, start_method: str) -> None:
    """Raises a ValueError where a ``Tuner`` asks, and the ranks are other processes than this one.

    To the main process, in which it asks, Lightning sends back weights and metrics only (seen in 2.6.6).
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    finders = (c for c in callbacks if isinstance(c, (BatchSizeFinder, LearningRateFinder)))
    starts = start_method != "popen" and trainer.strategy.launcher is not None
    if starts and any(private.is_of_tuner(finder) for finder in finders):
        raise ValueError(
            f"a Tuner with start_method={start_method!r}: what the started processes find does not come back to this "
            'one; use start_method="popen" or torchrun, or the callbacks BatchSizeFinder and LearningRateFinder in fit'
        )
