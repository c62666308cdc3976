"""When the stages of this rank ran which microbatch, for one step."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Event(NamedTuple):
    """A part of a step; times in seconds since its start on this rank.

    ``kind`` is ``"forward"``, ``"backward"`` or, of schedules that compute them apart, ``"weights"``.
    """

    kind: str
    stage: int
    microbatch: int
    begin: float
    end: float


class Timeline:
    """Notes when a schedule runs its parts, between :meth:`start` and :meth:`stop`; else it costs a comparison."""

    def __init__(self, device: torch.device) -> None:
        self.records = False
        self._device = device
        self._events: list[Event] = []
        self._zero = 0.0

    def start(self, group: dist.ProcessGroup) -> None:
        """Starts to note, on all ranks at once. One barrier over the group."""
        self._events = []
        dist.barrier(group)
        self._zero, self.records = time.perf_counter(), True

    def stop(self) -> list[Event]:
        """What was noted."""
        self.records = False
        return self._events

    def timed(self, kind: str, stage: int, run: Callable[..., Any]) -> Callable[..., Any]:
        """A part of a schedule, noted; its first argument is the number of the microbatch."""

        @wraps(run)
        def noted(index: int, *args: Any, **kwargs: Any) -> Any:
            if not self.records:
                return run(index, *args, **kwargs)
            begin = self._now()
            try:
                return run(index, *args, **kwargs)
            finally:
                self._events.append(Event(kind, stage, index, begin, self._now()))

        return noted

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - self._zero
