"""The threads of a rank that watch a run beside it; see [Note: how a hang ends]."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from lightning_dist.compat.distributed import default_store, timeout_of
from lightning_dist.elastic import guard
from lightning_dist.elastic.failures import Failure
from lightning_dist.elastic.hangs import GRACE, Hangs, Verdict
from lightning_dist.elastic.pulse import Pulse, StepTimes
from lightning_dist.elastic.stragglers import Stragglers

log = logging.getLogger(__name__)

SENT = 32
"""Of a rank's last steps, those that it tells."""
_PAUSE = 0.5
"""Seconds between two questions to the store; a twentieth of the timeout where that is less."""


def line_to(store: Any) -> socket.socket | None:
    """A connection to the process of a store on which nothing is sent; None for a store without one.

    It tells when that process is gone: torch would print an error with the stack of its C++ code.
    """
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return socket.create_connection((store.host, store.port)) if isinstance(store, dist.TCPStore) else None


def is_cut(line: socket.socket) -> bool:
    """Whether the other end is gone."""
    try:
        return not line.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


class Watch:
    """Two threads beside a run over several ranks: one looks at the thread that began it, one speaks with other ranks.

    Args:
        groups: gives the process groups of the layout, by name.
        device: of the rank.
        batch: gives the number of training batches begun in the run; None while something else runs.
        step: gives what is trained or evaluated, for a sentence.
        stages: gives the ranks that do the same work, together, for stragglers to be found; none where it is empty.

    Communication: over the store of the process group alone, see :class:`Hangs`; for stragglers each rank writes there
    what its last steps took, some 3 kB, and rank 0 reads it. The thread that trains does nothing for it.
    """

    is_on: ClassVar[bool] = False
    """Whether a run of this process is watched; one within another is watched with it."""

    def __init__(
        self,
        groups: Callable[[], Mapping[str, Any]],
        device: torch.device,
        batch: Callable[[], int | None],
        step: Callable[[], str],
        stages: Callable[[], Sequence[tuple[int, ...]]],
    ) -> None:
        self._groups, self._stages = groups, stages
        self._stragglers: Stragglers | None = None
        self._sent = 0
        self._pulse = Pulse(batch, threading.current_thread())
        self._refresh()
        timeout = min(timeout_of(group, device).total_seconds() for group in self._pulse.groups.values())
        self._pause = min(_PAUSE, timeout / 20) * max(1.0, dist.get_world_size() / 256)
        self._store, self._rank = default_store().clone(), dist.get_rank()
        self._store.set_timeout(timedelta(seconds=GRACE))
        self._of_run = store = dist.PrefixStore(f"lightning_dist/watch/{guard.number_of_run()}", self._store)
        self._hangs = Hangs(store, self._rank, dist.get_world_size(), timeout, self._pulse, step)
        self._line = line_to(self._store)
        self._ended, self._failed = threading.Event(), False
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._look, self._talk)]

    @staticmethod
    def begin(*args: Any) -> Watch | None:
        """Watches a run; None where one is watched already. The arguments are those of the class."""
        if Watch.is_on:
            return None
        Watch.is_on, watch = True, Watch(*args)
        for thread in watch._threads:
            thread.start()
        return watch

    @property
    def waited(self) -> float:
        """Seconds in which the thread that trains was in collectives or waited for them; see :class:`Pulse`."""
        return self._pulse.waited

    def end(self, failed: bool = False) -> None:
        """The run is over here. Threads that speak of a hang go on until it is told."""
        Watch.is_on = False
        self._failed |= failed
        self._ended.set()
        if not self._hangs.is_open:  # a thread within a call of C++ must not see the interpreter end
            for thread in self._threads:
                thread.join(GRACE)
            if self._line is not None:
                self._line.close()
        elif failed:  # the backend gave up first: the hang by which the run ends is told within a few questions
            self._threads[1].join(GRACE)

    def _refresh(self) -> None:
        groups = self._groups()
        self._pulse.groups = {name: group for name, group in groups.items() if group.size() > 1}

    def _look(self) -> None:
        is_told = False
        while not self._ended.wait(self._pulse.pause):
            try:
                self._pulse.look()
            except Exception:  # the next look may find another frame, and a hang must still be seen
                if not is_told:
                    log.warning("the thread that trains can't be looked at; stragglers may be missed", exc_info=True)
                is_told = True
            if (verdict := self._hangs.overdue()) is not None:
                self._end_by(verdict, verdict.rank)

    def _talk(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it the run
            while not self._ended.wait(self._pause) or self._hangs.is_open:
                if self._ended.is_set():  # a hang is being told
                    time.sleep(self._pause)
                if self._line is not None and is_cut(self._line):
                    return
                if not self._ended.is_set():
                    self._refresh()
                    self._exchange_steps()
                if (verdict := self._hangs.talk(self._pause, self._failed)) is not None:
                    guard.say_why(self._store, f"TimeoutError: rank {verdict.rank} {verdict.summary}")
                    # those that are missing end first, once all have heard it
                    missing = self._rank in verdict.missing
                    self._end_by(verdict, verdict.told_by, 2 * self._pause if missing else GRACE)

    def _exchange_steps(self) -> None:
        steps, stages = list(self._pulse.steps)[-SENT:], self._stages()
        if not steps or not stages or steps[-1].batch == self._sent:
            return
        self._sent = steps[-1].batch
        told = {"host": socket.gethostname(), "steps": list(map(astuple, steps))}
        self._of_run.set(f"steps/{self._rank}", json.dumps(told))
        keys = [f"steps/{rank}" for rank in range(sum(map(len, stages)))]
        if self._rank != 0 or not self._of_run.check(keys):
            return
        self._stragglers = self._stragglers or Stragglers(stages)
        every = [json.loads(self._of_run.get(key)) for key in keys]
        for rank, of_rank in enumerate(every):
            self._stragglers.add(rank, (StepTimes(*step) for step in of_rank["steps"]))
        for straggler in self._stragglers.found():
            log.warning(straggler.sentence(every[straggler.rank]["host"]))

    def _end_by(self, verdict: Verdict, teller: int, grace: float = 0.0) -> None:
        """Ends this process, at the latest after so many seconds, and leaves word for who launched it."""
        if (launch := Failure.launch) is not None:
            text = (verdict.summary, verdict.stacks, verdict.stacks)
            Failure(verdict.rank, launch.number, time.time() - GRACE, *text).write(launch.directory)
        elif teller == self._rank:
            print(f"\nrank {verdict.rank} {verdict.summary}\n\n{verdict.stacks}\n", file=sys.stderr, flush=True)
        time.sleep(grace)
        guard.end_children()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
