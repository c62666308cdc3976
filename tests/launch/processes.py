"""Which processes of a test are still there."""

from __future__ import annotations

import os
from pathlib import Path


def noted_pids(directory: Path) -> list[int]:
    """The processes that left a note in ``directory``."""
    return [int(note.name.rpartition("-")[2]) for note in directory.glob("rank*-*")]


def running(pids: list[int]) -> list[int]:
    """Those of ``pids`` that have not ended."""
    return [pid for pid in pids if _is_running(pid)]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
