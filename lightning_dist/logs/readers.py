"""Who reads logged values while steps run, and where: foreseen from the code, agreed on by the ranks, or met there."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from datetime import timedelta
from traceback import walk_stack
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import ProgressBar

from lightning_dist.compat.distributed import default_store
from lightning_dist.compat.lightning import HOOK_CALLERS, LoggerConnector
from lightning_dist.logs.code_scan import READS, SYNCS, is_library, scan_hook
from lightning_dist.logs.microbatches import RecordedLogs

SHOWS = "shows"
"""What a progress bar does with values, on rank 0 alone."""

_HOOKS = (
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end", "on_validation_batch_start", "on_validation_batch_end"),
    *("on_test_batch_start", "on_test_batch_end", "on_save_checkpoint"),
)
"""Hooks of a step, or run in one by callbacks; modules have them too, and theirs come after those of callbacks."""
_STEPS = ("training_step", "validation_step", "test_step")
_WITHIN = ("backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step")
"""Hooks of modules alone; some run around ``training_step`` and go on after it."""

PATIENCE = timedelta(seconds=60)
"""How long a rank that reads in a place that was not foreseen waits for the others to read too."""


class Readers:
    """Which hooks of a step, of a trainer's callbacks and module, read or log values, alike on all ranks of a group.

    Communication: one all-gather of a few bytes over the group, when it is made.
    """

    def __init__(self, trainer: pl.Trainer, group: dist.ProcessGroup) -> None:
        module = trainer.lightning_module
        plan: dict[str, frozenset[str]] = {}
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for hook in _HOOKS:
            # by the names under which Lightning profiles hooks, as seen in 2.6.6
            for callback in callbacks:
                action = f"[Callback]{callback.state_key}.{hook}"
                shows = {SHOWS} if isinstance(callback, ProgressBar) else set()
                plan[action] = plan.get(action, frozenset()) | scan_hook(callback, hook) | shows
            plan[f"[LightningModule]{type(module).__name__}.{hook}"] = scan_hook(module, hook)
        within = frozenset().union(*(scan_hook(module, hook) for hook in (*_STEPS, *_WITHIN)))
        training = {name for name in plan if ".on_validation" not in name and ".on_test" not in name}
        syncs = SYNCS in scan_hook(module, "training_step"), any(SYNCS in plan[name] for name in training)
        everyone: list[Any] = [None] * dist.get_world_size(group)
        own = {action: tuple(sorted(found)) for action, found in plan.items() if found}
        reads = any(READS in found for found in plan.values())
        dist.all_gather_object(everyone, (own, READS in within, reads, syncs), group)
        alike = all(other[0] == own for other in everyone)
        self.hooks = {action: frozenset(found) for action, found in own.items()} if alike else {}
        """What each does, by the name of the action: before those that read, all ranks reduce."""
        self.within_steps = any(other[1] or (not alike and other[2]) for other in everyone)
        """Whether something reads where no hook begins, or ranks have different hooks: steps end with whole values."""
        self.may_sync = any(other[3][0] for other in everyone)
        self.hooks_may_sync = any(other[3][1] for other in everyone)
        """Whether a training step, or its hooks, mention ``sync_dist``; the first step shows whether they log so."""


class Rendezvous:
    """Where the ranks of a group find out, without a collective, that all of them are at the same place.

    Works over the store of the process group. All ranks make theirs in the same order.
    """

    _numbers = itertools.count()

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._size = dist.get_world_size(group)
        self._key = f"lightning_dist/logs/{dist.get_process_group_ranks(group)[0]}/{next(self._numbers)}"
        self._count = 0

    def wait_for_all(self, refusal: str) -> None:
        """Until every rank has called it as often as this one.

        Raises:
            RuntimeError: with ``refusal``, if one does not come.
        """
        store: Any = default_store()
        key = f"{self._key}/{self._count}"
        self._count += 1
        if store.add(key, 1) == self._size:
            store.set(f"{key}/all", b"1")
        try:
            store.wait([f"{key}/all"], PATIENCE)
        except RuntimeError as error:
            raise RuntimeError(refusal) from error


def _watched(name: str) -> Any:
    def read(self: WatchedConnector) -> Any:
        self.before_read()
        return getattr(LoggerConnector, name).fget(self)

    return property(read)


class WatchedConnector(LoggerConnector):
    """Calls its ``before_read`` when somebody is about to read. Takes the place of a trainer's connector's class."""

    before_read: Callable[[], None]
    callback_metrics = _watched("callback_metrics")
    logged_metrics = _watched("logged_metrics")
    progress_bar_metrics = _watched("progress_bar_metrics")


def user_reads() -> str | None:
    """The name of the user's function that reads, if it is one and not a progress bar, which reads on rank 0 alone.

    Raises:
        RuntimeError: where only rank 0 reads, as is seen by ``rank_zero_only``.
    """
    reader, alone = None, False
    for frame, _ in walk_stack(sys._getframe()):
        name = str(frame.f_globals.get("__name__", ""))
        if isinstance(frame.f_locals.get("self"), ProgressBar):
            return None
        if frame.f_code.co_name in HOOK_CALLERS:
            break
        alone |= name == "lightning_utilities.core.rank_zero" and frame.f_code.co_name == "wrapped_fn"
        if reader is None and not is_library(name):
            reader = frame.f_code.co_qualname
    if reader is not None and alone:
        raise RuntimeError(refusal(reader))
    return reader


def refusal(place: str) -> str:
    """Why a read on some ranks alone has no answer."""
    return (
        f"{place} reads logged values (trainer.callback_metrics or the like) of a step on this rank, and not on all "
        "ranks: the others' part of the values would be missing. Read them on every rank and use them on one; or in "
        "a method of a callback or of the module by that name, where a reader is foreseen"
    )


def validate_finished(module: pl.LightningModule) -> None:
    """Sees that nobody reads what microbatches log while they run.

    Raises:
        RuntimeError: if the microbatch that runs has logged, and is read by the user.
    """
    recorder = getattr(vars(module).get("log"), "__self__", None)
    if isinstance(recorder, RecordedLogs) and recorder.has_logged and user_reads() is not None:
        raise RuntimeError(
            "pp: the step reads logged values (trainer.callback_metrics or the like) after it has logged, and the "
            "values of its batch are there only after its last microbatch: read them in a hook after the step"
        )
