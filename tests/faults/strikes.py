"""Strikes from outside, at moments that a seed draws; and which processes and files of a run are left."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

MARK = "TEST_RUN_OF"
"""A variable of a run's environment, by which all its processes can be found."""


def processes_of(mark: str) -> list[int]:
    """Those that were started with this :data:`MARK`, and what was forked from them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
            is_dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in environment.split(b"\0") and not is_dead:
            found.append(int(entry.name))
    return found


def wait_until_gone(mark: str, seconds: float) -> list[int]:
    """Waits for all processes of a run to end; those that have not."""
    deadline = time.monotonic() + seconds
    while (left := processes_of(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def note_rank(folder: Path) -> None:
    """Called on a rank as early as it can: says which process it is, and where its run's directory is."""
    rank, attempt = os.environ["RANK"], os.environ.get("LIGHTNING_DIST_ATTEMPT", "0")
    (folder / "directory").write_text(os.environ.get("LIGHTNING_DIST_RUN_DIRECTORY", ""))
    note = folder / f".rank-{rank}"
    note.write_text(f"{attempt} {os.getpid()}")
    note.rename(folder / f"rank-{rank}")


def noted_ranks(folder: Path, attempt: int, num_ranks: int) -> list[int]:
    """The processes of an attempt by rank; none while some have not begun."""
    notes = [folder / f"rank-{rank}" for rank in range(num_ranks)]
    told = [tuple(map(int, note.read_text().split())) for note in notes if note.exists()]
    pids = [pid for of_attempt, pid in told if of_attempt == attempt]
    return pids if len(pids) == num_ranks else []


def kill_at_random(run: Any, folder: Path, *, count: int, num_ranks: int, longest: float, seed: int) -> list[float]:
    """Kills a random rank of each attempt, at a moment up to ``longest`` seconds after its script begins.

    Args:
        run: the launching process (``Popen``).
        folder: in which ranks note themselves.
        count: of kills; fewer if the run ends before.

    Returns:
        the times of the kills, in seconds since the epoch.
    """
    chance, times = random.Random(seed), []
    while len(times) < count and run.poll() is None:
        pids = noted_ranks(folder, len(times), num_ranks)
        if not pids:
            time.sleep(0.02)
            continue
        time.sleep(chance.uniform(0, longest))
        try:
            os.kill(chance.choice(pids), signal.SIGKILL)
        except ProcessLookupError:  # the run has ended
            break
        times.append(time.time())
    return times
