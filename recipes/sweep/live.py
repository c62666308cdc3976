"""The table and the page of a sweep while it runs.

[Note: pages of a running sweep]
A thread of the sweep's process looks for what jobs leave when they begin and end, so it does not matter which launcher
runs them, or on which machine. It takes a tenth of the time at most: reading the curves of many jobs takes seconds.
When the process ends, whatever ends it but SIGKILL, it writes once more, and tells which jobs were interrupted.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.sweep.result import RESULT

log = logging.getLogger("recipes.train")

PAUSE = 1.0
"""Seconds between two looks, at least."""

SHARE = 0.1
"""Of the time, at most, in which it looks and writes."""


class Live:
    """Writes anew whenever a job of a sweep has begun or ended, until it is told to stop.

    Args:
        directory: of the sweep.
        write: what writes; called in a thread, and a last time when this process ends without :meth:`stop`.
    """

    def __init__(self, directory: Path, write: Callable[[], None]) -> None:
        self._directory, self._write = directory, write
        self._before = self._seen()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="page of the sweep", daemon=True)

    def start(self) -> None:
        """Begins; until it is stopped, SIGTERM unwinds this process, so that what runs in it ends first."""
        _replace_handler(signal.SIG_DFL, _leave)
        atexit.register(self._end)
        self._thread.start()

    def stop(self) -> None:
        """Ends, when a page that is being written is whole."""
        atexit.unregister(self._end)
        self._stopped.set()
        self._thread.join()
        _replace_handler(_leave, signal.SIG_DFL)

    def _watch(self) -> None:
        pause = PAUSE
        while not self._stopped.wait(pause):
            began = time.monotonic()
            self.look()
            pause = max(PAUSE, (time.monotonic() - began) * (1 - SHARE) / SHARE)

    def look(self) -> bool:
        """Writes if a job has begun or ended since it last did; says whether that was so, and went well."""
        now = self._seen()
        if now == self._before or not self._wrote():
            return False
        self._before = now
        return True

    def _seen(self) -> dict[str, int]:
        """When each job last told how it is."""
        found = {}
        for folder, folders, files in os.walk(self._directory):
            if RESULT in files:
                folders.clear()  # what a job has left: checkpoints, logs
                try:
                    found[folder] = os.stat(os.path.join(folder, RESULT)).st_mtime_ns
                except OSError:  # it was moved away meanwhile
                    continue
        return found

    def _wrote(self) -> bool:
        """Whether that went well: jobs write while they are read, and a page is no reason to end them."""
        try:
            self._write()
        except Exception as error:
            log.debug("no page of the running sweep: %s", error)
            return False
        return True

    def _end(self) -> None:
        self.stop()
        if self._seen():
            try:
                self._write()
            except Exception as error:
                log.warning("no page of the sweep: %s", error)


def _replace_handler(one: Any, other: Any) -> None:
    """Of SIGTERM; one that somebody else has set stays."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGTERM) is one:
        signal.signal(signal.SIGTERM, other)


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)
