"""Checkpoints that callbacks save while the store takes none: the training goes on, and they are saved when it can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_dist.checkpoint import BackgroundSaves, as_path
from lightning_dist.checkpoint.store_errors import StoreRefused, is_of_store
from lightning_dist.collectives import broadcast_object, gather_objects, raise_on_all_ranks
from lightning_dist.compat import lightning as private
from lightning_dist.patches import Patches
from lightning_dist.ranks import LayoutRanks

FIRST_WAIT, LONGEST_WAIT = 10, 1000
"""Batches after which a save is tried again; each time that it fails, twice as many."""


@dataclass
class _Save:
    """One that a callback began: by which of its methods, and what it knew before of the checkpoints that it keeps."""

    callback: ModelCheckpoint
    method: str
    before: dict[str, Any]
    step: int
    wait: int = FIRST_WAIT
    again_at: int = 0
    error: Exception | None = None
    """Of the last try."""

    @property
    def key(self) -> tuple[int, str]:
        return id(self.callback), self.method

    @property
    def chooses(self) -> bool:
        """Whether by a value, which later weights do not have."""
        return self.callback.monitor is not None and self.method != private.SAVE_LAST


class CallbackSaves:
    """The saves of a fit's ``ModelCheckpoint`` callbacks.

    [Note: a store that refuses]
    A full disk, a folder that is read-only, a store that is away: all ranks decide alike whether that is what ended a
    save. Then the callback is as if it had not saved: it forgets the file, and no older one is removed. It is warned of
    once a try. The save is tried again some batches later, at the callback's next one, and at the end of the fit, where
    it must succeed. It saves the state of that moment; where the callback chooses by a value, only as long as no other
    step was done, since the value is not that of other weights.

    Communication: as that of a save, and where one fails an all-gather of a flag, as an object. For whether a file is
    there, a broadcast in place of Lightning's all-reduce.
    """

    def __init__(self, ranks: LayoutRanks, saves: BackgroundSaves) -> None:
        self._ranks, self._saves = ranks, saves
        self._trainer: Any = None
        self._began: _Save | None = None
        """That which a callback runs now."""
        self._in_flight: _Save | None = None
        """That which goes on in the background."""
        self._failed: dict[tuple[int, str], _Save] = {}

    def attach(self, trainer: pl.Trainer, patches: Patches) -> None:
        """A fit begins."""
        self._trainer, self._began, self._in_flight, self._failed = trainer, None, None, {}
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                for method in private.SAVE_METHODS:
                    patches.wrap(callback, method, partial(self._save, callback, method))
                patches.set(callback, "file_exists", self._file_exists)
                patches.wrap(callback, "on_train_batch_end", partial(self._after_batch, callback))

    @contextmanager
    def refusals(self, path: Any) -> Iterator[None]:
        """Around what all ranks do together with the store: its errors are :class:`StoreRefused` on all ranks, while a
        callback saves.
        """
        try:
            yield
        except (OSError, RuntimeError) as error:
            if self._began is None or not self._is_of_store(error):
                raise
            raise _refused(path, error) from error

    def _is_of_store(self, error: Exception) -> bool:
        return any(gather_objects(is_of_store(error)))

    def _save(self, callback: ModelCheckpoint, method: str, own: Callable[..., None], *args: Any) -> None:
        """Wraps the methods by which a callback chooses a file, saves it, and removes an older one."""
        self.settle()
        save = _Save(callback, method, private.kept_files(callback), self._trainer.global_step)
        self._began = save
        try:
            own(*args)
        except StoreRefused as error:
            self._note(save, error)
            return
        finally:
            self._began = None
        self._failed.pop(save.key, None)
        if self._saves.is_busy:
            self._in_flight = save

    def _file_exists(self, path: Any, trainer: pl.Trainer) -> bool:
        """In place of the callback's method, which asks the store on rank 0 while the others wait for an answer."""
        there = False
        with self.refusals(path):
            with raise_on_all_ranks(f"look for {path}"):
                if self._ranks.rank == 0:
                    there = as_path(path).exists()
            return broadcast_object(there)

    def settle(self) -> None:
        """Waits for the save in the background; one of a callback that the store refused is noted."""
        save, self._in_flight = self._in_flight, None
        try:
            self._saves.wait()
        except (OSError, RuntimeError) as error:
            if save is None or not self._is_of_store(error):
                raise
            self._note(save, _refused(self._saves.path, error))

    def _note(self, save: _Save, error: Exception) -> None:
        private.set_kept_files(save.callback, save.before)
        if (earlier := self._failed.get(save.key)) is not None:
            save.wait = min(2 * earlier.wait, LONGEST_WAIT)
        save.again_at, save.error = self._batches + save.wait, error
        self._failed[save.key] = save
        again = "" if save.chooses else f"in {save.wait} batches, "
        rank_zero_warn(
            f"{error}. The training goes on, and earlier checkpoints are left; it is tried again {again}at the next "
            "checkpoint and at the end of the fit"
        )

    @property
    def _batches(self) -> int:
        return int(self._trainer.fit_loop.epoch_loop.batch_progress.total.processed)

    def _can_try_again(self, save: _Save) -> bool:
        return not save.chooses or save.step == self._trainer.global_step

    def _after_batch(self, callback: ModelCheckpoint, own: Callable[..., None], *args: Any) -> None:
        own(*args)
        for save in list(self._failed.values()):
            if save.callback is callback and self._batches >= save.again_at and not save.chooses:
                self._try_again(save)

    def _try_again(self, save: _Save) -> None:
        callback, trainer = save.callback, self._trainer
        getattr(callback, save.method)(trainer, private.monitor_candidates(callback, trainer))
        if save.key not in self._failed and save.method != private.SAVE_LAST:  # which Lightning saves after it
            getattr(callback, private.SAVE_LAST)(trainer, private.monitor_candidates(callback, trainer))

    def finish(self) -> None:
        """The fit ends; an OSError on all ranks where the store still refuses what would be lost."""
        self.settle()
        for save in list(self._failed.values()):
            if self._can_try_again(save):
                self._try_again(save)
                self.settle()
        for save in self._failed.values():
            if self._can_try_again(save) or not save.callback.best_model_path:
                raise StoreRefused(
                    f"the last checkpoint of this fit could not be written to {save.callback.dirpath}, and the store "
                    "still refuses it; the module has the trained weights: trainer.save_checkpoint(another path)"
                ) from save.error


def _refused(path: Any, error: Exception) -> StoreRefused:
    return StoreRefused(f"checkpoint {path} could not be written: {error}")
