"""Pulse: what the thread that trains does, as another thread of its process sees it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_dist.compat.distributed import num_collectives, unfinished_collectives
from lightning_dist.elastic import stacks

_SHORTEST, _LONGEST = 0.02, 0.25
"""Seconds between two looks at the thread."""
_LOOKS_A_STEP = 8


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
        self._counted: tuple[Any, ...] = ()
        self._still_since = time.monotonic()
        self._looked = time.monotonic()
        self._open: _OpenStep | None = None

    def look(self) -> None:
        """Once more."""
        now, frame = time.monotonic(), stacks.frame_of(self._thread)
        elapsed, before, self._looked = now - self._looked, self._looked, now
        if frame is None:
            return
        does = stacks.what_it_does(self._thread, frame)
        batch = self._batch()
        counted = (batch, does, *self._counts())
        if counted != self._counted:
            self._counted, self._still_since = counted, before
        self._note_step(batch, does, elapsed, now)

    def _counts(self) -> list[int]:
        with contextlib.suppress(RuntimeError, AttributeError, KeyError, ValueError):  # groups that form, or are gone
            return [num_collectives(group) for group in self.groups.values()]
        return []

    def _note_step(self, batch: int | None, does: str, elapsed: float, now: float) -> None:
        step = self._open
        if step is not None and batch == step.batch:
            step.seconds[does] += elapsed
            return
        times = _ThreadTimes.of(self._thread)
        if step is not None and batch is not None and batch == step.batch + 1:
            self.steps.append(step.ended(now, times))
            self.pause = min(max(self.steps[-1].whole / _LOOKS_A_STEP, _SHORTEST), _LONGEST)
        self._open = None if batch is None else _OpenStep(batch, now, times)

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
    def __init__(self, batch: int, begin: float, times: _ThreadTimes) -> None:
        self.batch, self._begin, self._times = batch, begin, times
        self.seconds = dict.fromkeys((stacks.OWN, stacks.DATA, stacks.WAITS), 0.0)

    def ended(self, now: float, times: _ThreadTimes) -> StepTimes:
        computed, queued = times.computed - self._times.computed, times.queued - self._times.queued
        data = self.seconds[stacks.DATA]
        own = max(self.seconds[stacks.OWN] - queued, computed - data)
        return StepTimes(self.batch, now - self._begin, own, data)


@dataclass(frozen=True)
class _ThreadTimes:
    """Seconds that a thread has computed, and has waited for a core while it could have computed."""

    computed: float
    queued: float

    @staticmethod
    def of(thread: threading.Thread) -> _ThreadTimes:
        """Zeros where the system does not tell."""
        try:
            text = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
        except OSError:
            return _ThreadTimes(0.0, 0.0)
        computed, queued = (int(number) / 1e9 for number in text.split()[:2])
        return _ThreadTimes(computed, queued)
