"""Processes of this machine: which belong to a rank, and ending them at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import defaultdict
from pathlib import Path


def birth(pid: int) -> int | None:
    """When a process began, in ticks since the machine did, which tells it from a later one of the same number; None
    where it has ended, or the system does not say (Linux does).
    """
    fields = _fields(pid)
    return int(fields[19]) if fields and fields[0] != "Z" else None


def kill_all(pids: list[int], spare: int | None = None) -> None:
    """Ends these processes by SIGKILL, and all that they started: a loader's workers would outlive them for seconds."""
    children = [child for pid in pids for child in descendants(pid)]
    for pid in {*children, *pids} - {spare}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The processes that one started, and those that they did."""
    children = defaultdict(list)
    for entry in Path("/proc").glob("[0-9]*"):
        if fields := _fields(int(entry.name)):
            children[int(fields[1])].append(int(entry.name))
    found, left = [], [pid]
    while left:
        found += (of_one := children[left.pop()])
        left += of_one
    return found


def _fields(pid: int) -> list[str]:
    """Of ``/proc/PID/stat``, those after the name: the state, the parent, ...; none where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
