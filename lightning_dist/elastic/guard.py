"""One failed rank ends the run: no rank stays behind, and the failure that came first is the one shown."""

from __future__ import annotations

import contextlib
import signal
import time
from datetime import timedelta
from typing import Any, ClassVar

import torch.distributed as dist
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

GRACE = 5.0
"""Seconds that the other processes of a script get to end by themselves, so that the first to fail can say why."""


def end_children(launcher: Any, grace: float = GRACE) -> None:
    """Ends the processes that this one started, after it failed.

    Where the backend notices a lost peer (gloo), they have failed by themselves and are showing why; where it does not,
    they wait in a collective for as long as its timeout lasts.

    Args:
        launcher: of the strategy; only that of scripts has processes to end.
        grace: seconds to wait for them.
    """
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return
    deadline = time.monotonic() + grace
    while any(process.poll() is None for process in launcher.procs) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in launcher.procs:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)


# ------------------------------------------------------------------ last words


class _Runs:
    """Of this process; every rank has as many."""

    number: ClassVar[int] = 0


def begin_run() -> None:
    """A run of a Trainer begins, on all ranks: what ended an earlier one is past. Communication: none."""
    _Runs.number += 1


def say_why(store: Any, message: str) -> None:
    """What ends this rank, for the others, at the store of the process group."""
    store.set(_key(), message)


def tell_why_it_ended(exception: BaseException) -> None:
    """Says to the other ranks what ends this one; or notes what another said, of which this one lost the connection."""
    if not dist.is_available() or not dist.is_initialized():
        return
    with contextlib.suppress(RuntimeError):  # the store may be gone as well
        store: Any = dist.distributed_c10d._get_default_store()  # private; seen in torch 2.14
        if _is_of_lost_peer(exception):
            with contextlib.suppress(RuntimeError):
                store.wait([_key()], timedelta(seconds=2))
        if store.check([_key()]):
            message = store.get(_key()).decode()
            if message.partition(": ")[2] not in str(exception) and message not in str(exception):
                exception.add_note(f"another rank ended before: {message}")
        elif isinstance(exception, Exception):
            say_why(store, f"{type(exception).__name__}: {exception}")


def what_ended_another() -> str:
    """What another rank said that ended it; empty if none did. Communication: one question to the store."""
    with contextlib.suppress(RuntimeError):
        store: Any = dist.distributed_c10d._get_default_store()
        if store.check([_key()]):
            return store.get(_key()).decode()
    return ""


def _key() -> str:
    return f"lightning_dist/ended/{_Runs.number}"


def _is_of_lost_peer(exception: BaseException) -> bool:
    return isinstance(exception, RuntimeError) and any(words in str(exception) for words in _LOST)


_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
"""Gloo's words (seen in torch 2.14)."""
