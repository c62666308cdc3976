"""What outlives the ranks of a run that is started again: a directory in the memory of their machine."""

from __future__ import annotations

import json
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

DIRECTORY = "LIGHTNING_DIST_RUN_DIRECTORY"
NUMBER = "LIGHTNING_DIST_ATTEMPT"
FIRST_RANKS = "LIGHTNING_DIST_FIRST_RANKS"
"""Variables by which whoever starts the ranks tells them; see :class:`Attempt`."""


class Place(NamedTuple):
    """Where a process is in its work.

    Attributes:
        fit: the number of the fit in the process, from 0.
        step: optimizer steps that it has finished (``trainer.global_step``).
        attempt: in which it came there.
        time: when, in seconds since the epoch.
    """

    fit: int
    step: int
    attempt: int
    time: float


_PLACE = struct.Struct("=qqqd")


@dataclass(frozen=True)
class Attempt:
    """One start of the ranks of a run, by an agent that starts them again when they fail or when their number changes.

    Attributes:
        directory: of this machine, made before the first attempt and removed when the run has ended. It is in memory
            where the machine has such a place; other machines of the run do not see it.
        number: 0 for the first start by this machine's agent.
        first_ranks: how many ranks the run began with, on all machines together; the layout and the batch size that a
            user writes are for those. None where their number does not change.
    """

    directory: Path
    number: int
    first_ranks: int | None = None

    @staticmethod
    def current() -> Attempt | None:
        """That of this process; None where nobody would start it again."""
        if DIRECTORY not in os.environ:
            return None
        first = os.environ.get(FIRST_RANKS)
        return Attempt(
            Path(os.environ[DIRECTORY]), int(os.environ.get(NUMBER, 0)), None if first is None else int(first)
        )

    def variables(self) -> dict[str, str]:
        """By which :meth:`current` knows it, for the environment of a rank."""
        first = {} if self.first_ranks is None else {FIRST_RANKS: str(self.first_ranks)}
        return {DIRECTORY: str(self.directory), NUMBER: str(self.number), **first}

    def record(self, event: str, **values: Any) -> None:
        """Notes what happened to this rank, and when: one line of JSON in a file of this process's own, which what
        comes after it can read (the time lost between two attempts, say).
        """
        line = json.dumps({"event": event, "time": time.time(), "attempt": self.number, **values})
        rank = os.environ.get("RANK", "agent")
        with (self.directory / f"events-{rank}.jsonl").open("a") as file:
            file.write(line + "\n")

    def events(self) -> list[dict[str, Any]]:
        """All that processes of this machine recorded, in the order of time."""
        lines = [line for file in self.directory.glob("events-*.jsonl") for line in file.read_text().splitlines()]
        return sorted((json.loads(line) for line in lines), key=lambda event: event["time"])

    def open_progress(self) -> int:
        """The descriptor of the file in which this rank notes where it is, by :meth:`note_progress`."""
        return os.open(self.directory / f"progress-{os.environ.get('RANK', 0)}", os.O_CREAT | os.O_RDWR, 0o600)

    def note_progress(self, descriptor: int, fit: int, step: int) -> None:
        """Notes that a step has finished: 32 bytes into memory, which takes some microseconds."""
        os.pwrite(descriptor, _PLACE.pack(fit, step, self.number, time.time()), 0)

    def progress(self) -> Place | None:
        """The furthest that a rank of this machine came in this attempt; None before its first step has finished."""
        notes = [file.read_bytes() for file in self.directory.glob("progress-*")]
        places = [Place(*_PLACE.unpack(note)) for note in notes if len(note) == _PLACE.size]
        return max((place for place in places if place.attempt == self.number), default=None)
