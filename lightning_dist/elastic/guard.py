"""A run that ends by an exception: where it does on all ranks they may go on together, else all end, promptly.

[Note: who may go on]
Code around a fit catches exceptions: to try a smaller batch, to prune a trial. That is safe where every rank left the
run, at the same place of the collectives: they go on as one process would. Where one left alone, others wait for it.
If it ends, they lose the connection to it and end too. If it lives on, it is ended after :data:`PATIENCE`, or refused
the next run.

So each rank says in the process group's store how it left a run. What began the end is told beside the errors of those
that only lost their connection.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, ClassVar

import torch.distributed as dist

from lightning_dist.compat.distributed import default_store, num_collectives
from lightning_dist.compat.lightning import started_processes
from lightning_dist.elastic.failures import is_of_lost_peer

# In seconds
GRACE = 5.0  # for the other processes of a script to end by themselves, so that the first to fail can say why
AT_ONCE = 2.0  # within which ranks that met an exception alike leave the run
PATIENCE = 30.0  # for others to leave a run too that a rank left by an exception, and lives on
LONGEST = 600.0  # the same, for others that are leaving it
_POLL = 0.05


class _Runs:
    """The runs of this process. It is a state of the whole process, as its process group is: a run that follows, of
    another Trainer and another strategy, has to know how this process left the one before.

    Attributes:
        number: of the last run in the process group; the same on all ranks.
        outer: numbers of runs within which this one runs: a validation in a hook of a fit, say.
        left: the exception by which this process left the last run; None where it ended well.
        children: processes of the other ranks that this one started.
    """

    number: ClassVar[int] = 0
    is_on: ClassVar[bool] = False
    outer: ClassVar[list[int]] = []
    left: ClassVar[str | None] = None
    children: ClassVar[list[Any]] = []


def begin_run() -> None:
    """A run of a Trainer begins, on all ranks of a layout; nothing before there is a process group.

    Communication: none where the last run ended well here; else this rank waits at the store for the others to have
    left it too: a RuntimeError where they are still in it, or left it at another place.
    """
    if (store := _store()) is None:
        return
    left, _Runs.left = _Runs.left, None
    if _Runs.is_on:
        _Runs.outer.append(_Runs.number)
    try:
        if left is not None and store.check([_key(dist.get_rank())]):  # else that was in another process group
            _meet_after(left)
    finally:
        _Runs.number = store.add(f"lightning_dist/runs/{dist.get_rank()}", 1)
        _Runs.is_on = True
        if _Runs.number == 1:  # of another process group
            _Runs.outer.clear()


def number_of_run() -> int:
    """The number of the run that is going on; the same on all ranks."""
    return _Runs.number


def end_run(groups: Mapping[str, Any], exception: BaseException | None = None, launcher: Any = None) -> None:
    """This rank leaves a run; nothing if it has left it. Communication: none; it is said at the store.

    Args:
        groups: process groups of the run, by a name that all ranks of one have for it; what was done in them tells
            whether ranks left it at the same place.
        exception: by which it leaves, if it does.
        launcher: of the strategy. Where it started processes and this run fails, they end with this process.
    """
    note_children(launcher)
    if exception is not None and _Runs.children:
        atexit.unregister(end_children)
        atexit.register(end_children)
    if not _Runs.is_on:
        return
    _Runs.is_on = bool(_Runs.outer)
    if exception is not None:
        _tell_why_it_ended(exception)
        _Runs.left = _words(exception)
    with contextlib.suppress(RuntimeError):
        _say_how_it_left(groups, exception)
    if _Runs.outer:
        _Runs.number = _Runs.outer.pop()


def note_children(launcher: Any) -> None:
    """The launcher of a strategy may have started the processes of the other ranks."""
    if started := started_processes(launcher):
        _Runs.children = started


def _say_how_it_left(groups: Mapping[str, Any], exception: BaseException | None) -> None:
    if (store := _store()) is None:
        return
    counts = {name: num_collectives(group) for name, group in groups.items()}
    store.set(_key(dist.get_rank()), json.dumps({"by": _Runs.left, "collectives": counts}))
    if exception is not None and not is_of_lost_peer(exception):
        threading.Thread(target=_watch, args=(_Runs.number, _words(exception)), daemon=True).start()


def say_it_leaves() -> None:
    """An exception has left the loop of this run, and callbacks and loggers may take their time with it, before
    :func:`end_run`: the others wait longer. Communication: none; it is said at the store.
    """
    with contextlib.suppress(RuntimeError):
        if (store := _store()) is not None and _Runs.is_on:
            store.set(f"{_key(dist.get_rank())}/leaves", "1")


def _meet_after(left: str) -> None:
    """After a run that this rank left by an exception."""
    began = time.monotonic()
    while absent := _absent(_store(), _Runs.number):
        if time.monotonic() - began > _longest(_store(), _Runs.number, absent):
            break
        time.sleep(_POLL)
    if absent:
        raise RuntimeError(_told_of(absent, left))
    said = _said(_store())
    if not _at_one_place(said):
        hows = [f"by {one['by']}" if one["by"] is not None else "at its end" for one in said]
        ways = ", ".join(f"rank {rank} {how}" for rank, how in enumerate(hows))
        raise RuntimeError(
            f"the ranks left an earlier run at different places ({ways}), so what they send each other no longer fits "
            "together; start the processes anew, or raise what ends a run on all ranks at the same place "
            "(trainer.strategy.reduce_boolean_decision)"
        )
    atexit.unregister(end_children)


def left_together() -> bool:
    """Whether all ranks left the run by an exception within :data:`AT_ONCE`, at the same place of its collectives, so
    that they can communicate once more. All are told the same. Communication: none; ranks meet at the store.
    """
    store = _store()
    if store is None or _Runs.outer or _Runs.left is None:
        return False
    began, key = time.monotonic(), f"{_key(number=_Runs.number)}/together"
    with contextlib.suppress(RuntimeError):
        while (absent := _absent(store, _Runs.number)) and time.monotonic() - began < AT_ONCE:
            time.sleep(_POLL)
        if store.add(f"{key}/asked", 1) == 1:  # the first one decides
            store.set(key, "yes" if not absent and _at_one_place(_said(store)) else "")
        return store.get(key) == b"yes"
    return False


def _said(store: Any) -> list[dict[str, Any]]:
    """How each rank left the last run."""
    return [json.loads(store.get(_key(rank))) for rank in range(dist.get_world_size())]


def _at_one_place(said: list[dict[str, Any]]) -> bool:
    """Whether all had begun as many collectives in each group."""
    counts = {(name, count) for one in said for name, count in one["collectives"].items()}
    return len(counts) == len({name for name, _ in counts})


def _absent(store: Any, number: int) -> list[int]:
    """Ranks that have not left the run."""
    return [rank for rank in range(dist.get_world_size()) if not store.check([_key(rank, number)])]


def _longest(store: Any, number: int, absent: list[int]) -> float:
    """How long to wait for ranks that have not left a run: longer where all are leaving it."""
    return LONGEST if all(store.check([f"{_key(rank, number)}/leaves"]) for rank in absent) else PATIENCE


def _told_of(absent: list[int], left: str) -> str:
    ranks = f"ranks {', '.join(map(str, absent))}" if len(absent) > 1 else f"rank {absent[0]}"
    return (
        f"rank {dist.get_rank()} left a run by {left}, and {ranks} did not within {PATIENCE:g} s: they would wait for "
        "this one in it for good. An exception that is caught must come on all ranks alike: agree on what it hangs on "
        "by trainer.strategy.reduce_boolean_decision(...)"
    )


def _watch(number: int, left: str) -> None:
    """Ends this process, or those that it started, if it lives on after a run that others are still in. It holds the
    store no longer than it asks: who lets go of it last ends it.
    """
    began = time.monotonic()
    with contextlib.suppress(RuntimeError, ValueError):  # the store is gone; this process has left its process group
        absent, longest = _still_in(number)
        while absent and time.monotonic() - began < longest + GRACE:  # a next run says it better
            time.sleep(_POLL)
            absent, longest = _still_in(number)
        if absent:
            print(f"\n{_told_of(absent, left)}. It ends now.", file=sys.stderr, flush=True)
            end_children(0)
            os._exit(1)


def _still_in(number: int) -> tuple[list[int], float]:
    """Ranks still in a run that this one left, none where that is past here, and how long to wait for them."""
    store = _store()
    if store is None or number != _Runs.number or not store.check([_key(dist.get_rank(), number)]):
        return [], 0
    absent = _absent(store, number)
    return absent, _longest(store, number, absent)


def end_children(grace: float = GRACE) -> None:
    """Ends the processes that this one started, when it ends after it failed, some seconds later: where the backend
    notices a lost peer (gloo), they fail by themselves and show why; elsewhere they wait for a collective's timeout.
    """
    deadline = time.monotonic() + grace
    while any(process.poll() is None for process in _Runs.children) and time.monotonic() < deadline:
        time.sleep(_POLL)
    for process in _Runs.children:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)


def say_why(store: Any, message: str) -> None:
    """What ends this rank, for the others, at the store of the process group."""
    store.set(_key(), message)


def what_ended_another() -> str:
    """What another rank said that ended it; empty if none did. Communication: one question to the store."""
    with contextlib.suppress(RuntimeError):
        if (store := _store()) is not None and store.check([_key()]):
            return store.get(_key()).decode()
    return ""


def _tell_why_it_ended(exception: BaseException) -> None:
    """Says to the other ranks what ends this one; or notes what another said, of which this one lost the connection."""
    with contextlib.suppress(RuntimeError):  # the store may be gone as well
        if (store := _store()) is None:
            return
        if is_of_lost_peer(exception):
            with contextlib.suppress(RuntimeError):
                store.wait([_key()], timedelta(seconds=2))
        if store.check([_key()]):
            message = store.get(_key()).decode()
            if message.partition(": ")[2] not in str(exception) and message not in str(exception):
                exception.add_note(f"another rank ended before: {message}")
        elif isinstance(exception, Exception):
            say_why(store, _words(exception))


def _words(exception: BaseException) -> str:
    return f"{type(exception).__name__}: {exception}"


def _store() -> Any:
    """The store of the process group; None without one."""
    return default_store() if dist.is_available() and dist.is_initialized() else None


def _key(rank: int | None = None, number: int | None = None) -> str:
    """The key of the first words that ended a run, or of how one rank left it."""
    run = f"lightning_dist/ended/{_Runs.number if number is None else number}"
    return run if rank is None else f"{run}/{rank}"
