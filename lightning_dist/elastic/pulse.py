"""Pulse: what the thread that trains does, as another thread of its process sees it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lightning_dist.compat.distributed import num_collectives, unfinished_collectives
from lightning_dist.elastic import stacks

_SHORTEST, _LONGEST = 0.02, 0.25
"""Seconds between two looks at the thread."""
_LOOKS_A_STEP = 16


@dataclass(frozen=True)
class Wait:
    """A collective that a rank waits in: ``"all_reduce over dp_replicate [0, 1]"``, for so many seconds."""

    collective: str
    seconds: float
    timeout: float | None = None
    """Of the collective, where torch's flight recorder has it."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one training batch on one rank.

    Attributes:
        batch: its number in the run.
        whole: from its start to that of the next.
        own: outside of what it waits for other ranks and for its data, and for a core of the machine.
        data: in which it waits for its data.
    """

    batch: int
    whole: float
    own: float
    data: float


class Pulse:
    """Looks at a thread, some fifty times a second at most; the thread itself does nothing for it.

    Args:
        batch: gives the number of training batches begun in this run; None while something else runs.
        thread: the one that trains.
    """

    def __init__(self, batch: Callable[[], int | None], thread: threading.Thread) -> None:
        self._batch, self._thread = batch, thread
        self.groups: Mapping[str, Any] = {}
        """The process groups of the layout, by name."""
        self.steps: deque[StepTimes] = deque(maxlen=256)
        """Of the last training batches."""
        self.pause = _SHORTEST
        self.waited = 0.0
        """Seconds in which the thread was in a collective or waited for one, since it is looked at; by the looks."""
        self._counted: tuple[Any, ...] = ()
        self._still_since = time.monotonic()
        self._last = _Moment(self._still_since, stacks.OWN, False, 0.0, 0.0)
        self._open: _OpenStep | None = None

    def look(self) -> None:
        """Once more."""
        frame = stacks.frame_of(self._thread)
        if frame is None:
            return
        now = _Moment.of(self._thread, frame)
        batch = self._batch()
        counted = (batch, now.does, *self._counts())
        if counted != self._counted:
            self._counted, self._still_since = counted, self._last.seconds
        self._note_step(batch, now)
        looks = (self._last.does == stacks.WAITS) + (now.does == stacks.WAITS)
        self.waited += (now.seconds - self._last.seconds) * looks / 2
        self._last = now

    def _counts(self) -> list[int]:
        with contextlib.suppress(RuntimeError, AttributeError, KeyError, ValueError):  # groups that form, or are gone
            return [num_collectives(group) for group in self.groups.values()]
        return []

    def _note_step(self, batch: int | None, now: _Moment) -> None:
        step = self._open
        if step is not None:
            step.add(self._last, now)
            if batch == step.batch:
                return
            if batch == step.batch + 1:
                self.steps.append(step.ended(now))
                self.pause = min(max(self.steps[-1].whole / _LOOKS_A_STEP, _SHORTEST), _LONGEST)
        self._open = None if batch is None else _OpenStep(batch, now)

    @property
    def still(self) -> float:
        """Seconds in which it has begun no batch and no collective of the layout, and does the same."""
        return time.monotonic() - self._still_since

    def wait(self) -> Wait | None:
        """The collective that the thread waits in; None if it is elsewhere. Takes less than a millisecond, a long
        flight record more.
        """
        frame, unfinished = stacks.frame_of(self._thread), unfinished_collectives()
        on_device = [entry for entry in unfinished if not entry["profiling_name"].startswith("gloo:")]
        waits = frame is not None and stacks.is_waiting(self._thread, frame)
        if not waits and not on_device:
            return None
        # what gloo has not ended may have been ended by now, and p2p is not there: the last one is what it waits for
        entry = on_device[0] if on_device else unfinished[-1] if unfinished else None
        if entry is None:
            within = "" if frame is None else stacks.within(frame)
            return Wait(f"a send or receive ({within})", self.still)
        seconds = time.time() - entry["time_created_ns"] / 1e9
        return Wait(self._named(entry), seconds if on_device else min(seconds, self.still), entry["timeout_ms"] / 1e3)

    def _named(self, entry: Mapping[str, Any]) -> str:
        name, (number, description) = entry["profiling_name"].partition(":")[2], entry["process_group"]
        named = [known for known, group in self.groups.items() if group.group_name == number]
        return f"{name} over {' = '.join(named[:2]) or description}"

    def place(self) -> str:
        """Where the thread is, for a sentence."""
        frame = stacks.frame_of(self._thread)
        return "has ended" if frame is None else stacks.place(self._thread, frame)

    def stack(self) -> str:
        """The stack of the thread as text."""
        frame = stacks.frame_of(self._thread)
        return "" if frame is None else stacks.stack(frame)


class _OpenStep:
    def __init__(self, batch: int, begin: _Moment) -> None:
        self.batch, self._begin = batch, begin
        self._own = self._data = 0.0

    def add(self, before: _Moment, now: _Moment) -> None:
        """What lies between two looks.

        What a thread computes is its own, but where it loads. What it sleeps belongs to the looks at which it slept, in
        equal parts; where it did at neither, it slept in between, in code of its own.
        """
        computed = now.computed - before.computed
        slept = now.seconds - before.seconds - (now.queued - before.queued) - computed
        sleeping = [look for look in (before, now) if look.sleeps] or [before, now]
        for look in (before, now):
            share = slept / len(sleeping) if look in sleeping else 0.0
            if look.does == stacks.DATA:
                self._data += computed / 2 + share
            else:
                self._own += computed / 2 + (share if look.does == stacks.OWN else 0.0)

    def ended(self, now: _Moment) -> StepTimes:
        return StepTimes(self.batch, now.seconds - self._begin.seconds, max(self._own, 0.0), max(self._data, 0.0))


@dataclass(frozen=True)
class _Moment:
    """When a thread was looked at, and what it did.

    Attributes:
        seconds: of the clock.
        does: what it did.
        sleeps: whether it was off its core for that, as always where it waits for other ranks.
        computed, queued: seconds in which it had computed, and waited for a core while it could have computed; zeros
            where the system does not tell.
    """

    seconds: float
    does: str
    sleeps: bool
    computed: float
    queued: float

    @staticmethod
    def of(thread: threading.Thread, frame: FrameType) -> _Moment:
        does, seconds = stacks.what_it_does(thread, frame), time.monotonic()
        sleeps = does == stacks.WAITS or stacks.sleeps(thread)
        try:
            text = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
        except OSError:
            return _Moment(seconds, does, sleeps, 0.0, 0.0)
        computed, queued = (int(number) / 1e9 for number in text.split()[:2])
        return _Moment(seconds, does, sleeps, computed, queued)
