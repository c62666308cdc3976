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
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner.lr_finder import _LRCallback
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor
from typing_extensions import override

from lightning_dist import checkpoint as checkpoints
from lightning_dist.checkpoint.hooks import CheckpointHooks
from lightning_dist.collectives import broadcast_object
from lightning_dist.data.dealing import dealt_by
from lightning_dist.parallel import Replicated
from lightning_dist.random_states import RandomStates

_BATCH_SIZE, _LEARNING_RATE = ".scale_batch_size_", ".lr_find_"
"""How the names of the finders' checkpoints begin (seen in Lightning 2.6.6)."""
_PATIENCE = timedelta(minutes=2)
"""For ranks to tell whether a step fitted; those that wait for one that ran out of memory never do."""


class TuningHooks(CheckpointHooks):
    """The part of a strategy that knows Lightning's finders."""

    _search: Search | None = None

    @override
    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        _refuse_lost_answers(self.lightning_module.trainer, self._start_method)
        super().setup_environment()

    # ------------------------------------------------------------------ a search, from its save to its removal

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """As that of :class:`CheckpointHooks`; a finder's begins a search."""
        kind = _kind_of_search(filepath)
        if kind is not None:
            self._search = Search(kind, filepath, self._trainer, self)
            filepath = self._search.path
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        if self._search is not None:
            checkpoint_path = self._search.path
        return super().load_checkpoint(checkpoint_path, weights_only)

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        search = self._search
        if search is None or _kind_of_search(filepath) is None:
            super().remove_checkpoint(filepath)
            return
        super().remove_checkpoint(search.path)
        self._end_search()
        search.random.restore(self.root_device)
        if search.kind == _BATCH_SIZE and search.loop is search.trainer.fit_loop:
            search.begin_data_again()

    def _end_search(self) -> None:
        search, self._search = self._search, None
        assert search is not None
        search.end()
        self._last_step = search.last_step

    @override
    def _resume_from(self, checkpoint: Any) -> None:
        if self._search is None:  # a finder goes back to where it was called; the loaders begin their epoch anew
            super()._resume_from(checkpoint)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self._search is not None:
            self._search.watch_losses()

    def _leave_search(self) -> None:
        """After an exception that ended the finder before it went back to its checkpoint."""
        if self._search is not None:
            if self.is_global_zero:
                checkpoints.remove(self._search.path)
            self._end_search()

    # ------------------------------------------------------------------ steps that may not fit in memory

    def _trial(self) -> Any:
        """Around what a step computes: while a batch size is looked for, ranks agree on whether it fitted."""
        search = self._search
        return nullcontext() if search is None or search.fits is None else search.fits.agreed(self._forget_step)

    def _forget_step(self) -> None:
        assert self._parallel is not None
        self._parallel.forget_step()

    def _apart(self) -> Any:
        """Around a backward pass: in a trial copies reduce no gradients, so that none waits for another in it.

        The weights of a trial are thrown away.
        """
        search = self._search
        is_apart = search is not None and search.fits is not None and isinstance(self._parallel, Replicated)
        return self._parallel.accumulating() if is_apart and self._parallel is not None else nullcontext()

    @override
    def batch_to_device(self, *args: Any, **kwargs: Any) -> Any:
        with self._trial():
            return super().batch_to_device(*args, **kwargs)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._trial():
            return super().optimizer_step(*args, **kwargs)

    @override
    def barrier(self, name: str | None = None) -> None:
        if self._search is not None and self._search.fits is not None and self._search.fits.broken is not None:
            raise self._search.fits.broken  # ranks are at different places: Lightning's clean-up would wait for good
        super().barrier(name)


class Search:
    """One search of a finder of Lightning, which has just asked for its checkpoint.

    Args:
        kind: of the finder's checkpoints.
        path: of this rank; Lightning draws another name on each.
        trainer: of the search.
        strategy: the Trainer's.

    Communication: one broadcast of the path over the world; where a batch size is looked for, a process group of gloo
    over the world is made, to be able to talk of steps that failed.
    """

    def __init__(self, kind: str, path: _PATH, trainer: Any, strategy: TuningHooks) -> None:
        self.kind, self.trainer, self._strategy = kind, trainer, strategy
        self.path: str = broadcast_object(str(path))
        self.random = RandomStates.now(strategy.root_device)
        self.last_step = strategy._last_step
        self.loop = trainer._active_loop
        self.fits: Agreement | None = None
        self._set_up_data = vars(self.loop).get("setup_data")
        if strategy.world_size > 1 and kind == _BATCH_SIZE:
            self.fits = Agreement(strategy)
            self.loop.setup_data = partial(self._with_own_length, self.loop.setup_data)

    def _with_own_length(self, set_up: Callable[[], None]) -> None:
        """Stands before Lightning's method: its finder stops at a batch of the whole data set, here of a rank's part.

        ``_dataset_length`` is asked by the finder alone (seen in 2.6.6).
        """
        set_up()
        combined = self.loop._combined_loader
        if combined is not None and any(dealt_by(loader) is not None for loader in combined.flattened):
            whole = type(combined)._dataset_length.__get__(combined)
            combined._dataset_length = lambda: -(-whole() // self._strategy.num_data_ranks)

    def watch_losses(self) -> None:
        """Shows the finder of a learning rate the loss of the whole batch; see :meth:`_with_whole_loss`."""
        for callback in self.trainer.callbacks:
            if isinstance(callback, _LRCallback) and "on_train_batch_end" not in vars(callback):
                seen = partial(self._with_whole_loss, callback.on_train_batch_end)
                callback.on_train_batch_end = seen  # type: ignore[method-assign]

    def _with_whole_loss(
        self, original: Callable[..., None], trainer: Any, module: Any, outputs: Any, *args: Any
    ) -> None:
        """Communication: one all-reduce of the loss over the data ranks."""
        if outputs:
            loss = outputs if isinstance(outputs, Tensor) else outputs["loss"]
            outputs = {"loss": self._strategy.reduce(loss.detach())}
        original(trainer, module, outputs, *args)

    def begin_data_again(self) -> None:
        """The training's loaders begin as if nothing had been drawn; as the finder of a learning rate does itself."""
        self.loop._combined_loader = None
        self.loop.setup_data()

    def end(self) -> None:
        """Leaves Lightning's loop as it was."""
        if self.fits is not None:
            self.fits.end()
            del self.loop.setup_data
            if self._set_up_data is not None:
                self.loop.setup_data = self._set_up_data


class Agreement:
    """Whether what every rank has just computed fitted in its memory.

    Args:
        strategy: set up.
    """

    def __init__(self, strategy: TuningHooks) -> None:
        self.broken: RuntimeError | None = None
        """Why ranks can't go on together."""
        self._rank, self._layout = strategy.global_rank, strategy.layout
        self._patience = min(_PATIENCE, strategy._timeout)
        self._group: Any = dist.new_group(backend="gloo", timeout=self._patience)
        mesh = strategy.mesh
        assert mesh is not None
        self._groups: list[Any] = [dist.distributed_c10d._get_default_group(), mesh.data.get_group()]
        self._groups += [mesh.root[axis].get_group() for axis in mesh.root.mesh_dim_names or ()]

    @contextmanager
    def agreed(self, forget: Callable[[], None]) -> Iterator[None]:
        """An error that any rank meets inside is met by all; one for want of memory as Lightning's finder knows it.

        Args:
            forget: drops what is left of a step that failed.

        Communication: one all-gather of a short object over the world, on gloo.

        Raises:
            RuntimeError: ranks failed after different numbers of collectives, or one did while others wait for it in a
                collective, which none comes back from.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        is_memory = error is not None and is_oom_error(error)
        verdict = (None if error is None else f"{type(error).__name__}: {error}", is_memory, self._collectives)
        verdicts: list[Any] = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(verdicts, verdict, self._group)
        except RuntimeError as silence:
            if error is None:
                raise
            raise self._break(
                f"rank {self._rank} met {verdict[0]}, and another rank gave no word of its step for "
                f"{self._patience.total_seconds():.0f} s: under {self._layout} it waits for this one inside of it"
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

    @property
    def _collectives(self) -> tuple[int, ...]:
        """How many this rank has begun in each group (private; seen in torch 2.14)."""
        return tuple(group._get_sequence_number_for_group() for group in self._groups)

    def end(self) -> None:
        """Gives the process group up."""
        if self.broken is None:
            dist.destroy_process_group(self._group)


def _kind_of_search(path: _PATH) -> str | None:
    name = os.path.basename(str(path))
    return next((kind for kind in (_BATCH_SIZE, _LEARNING_RATE) if name.startswith(kind)), None)


def _refuse_lost_answers(trainer: pl.Trainer, start_method: str) -> None:
    """A ``Tuner`` asks in the main process, to which Lightning sends back weights and metrics only (seen in 2.6.6)."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    asks = any(isinstance(c, (BatchSizeFinder, LearningRateFinder)) and c._early_exit for c in callbacks)
    if asks and start_method != "popen" and trainer.strategy.launcher is not None:
        raise ValueError(
            f"a Tuner with start_method={start_method!r}: what the started processes find does not come back to this "
            'one; use start_method="popen" or torchrun, or the callbacks BatchSizeFinder and LearningRateFinder in fit'
        )
