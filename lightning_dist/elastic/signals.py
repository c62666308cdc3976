"""Signals that ask a run to leave: noted when they come, and answered where the run can be gone on with."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

REQUEUE_STATUS = 75
"""The status of a process that asks to be started again: EX_TEMPFAIL of sysexits.h, "temporary failure; try again"."""


class Asked(IntEnum):
    """What was asked of a run; of what ranks were asked, the largest counts."""

    NOTHING = 0
    LEAVE = 1
    """And whoever asked knows whether it is started again: SIGTERM."""
    REQUEUE = 2
    """And it sees to that itself, where it can: SLURM's warning, a deadline."""


class LeaveSignals:
    """Notes signals between :meth:`listen` and :meth:`stop`, in place of what they did before.

    A handler of the user's for SIGTERM is called as well, after the signal was noted, as under Lightning. A signal
    that asks for a requeue and that somebody handles or ignores already is left to them.

    Attributes:
        noted: the most that was asked.
    """

    def __init__(self) -> None:
        self.noted = Asked.NOTHING
        self._meanings: dict[int, Asked] = {}
        self._before: dict[int, Any] = {}

    def listen(self, meanings: Mapping[int, Asked]) -> None:
        """Begins to note these signals; in the main thread, others can't."""
        self.noted, self._meanings = Asked.NOTHING, dict(meanings)
        if threading.current_thread() is not threading.main_thread():
            return
        for number in meanings:
            if number == signal.SIGTERM or not is_handled(number):
                self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = max(self.noted, self._meanings.get(number, Asked.LEAVE))
        before = self._before.get(number)
        if callable(before):
            before(number, frame)

    def stop(self) -> None:
        """Gives the signals back, but for one that was given another handler since."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def is_handled(number: int) -> bool:
    """Whether somebody handles or ignores a signal, in Python or (as far as Linux tells) below: faulthandler, say."""
    if signal.getsignal(number) is not signal.SIG_DFL:
        return True
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigCgt", "SigIgn"))]
    return any(mask >> (number - 1) & 1 for mask in masks)
