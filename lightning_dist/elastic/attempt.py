"""What outlives the ranks of a run that is started again: a directory in the memory of their machine."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIRECTORY = "LIGHTNING_DIST_RUN_DIRECTORY"
NUMBER = "LIGHTNING_DIST_ATTEMPT"
"""Variables by which whoever starts the ranks tells them; see :class:`Attempt`."""


@dataclass(frozen=True)
class Attempt:
    """One start of the ranks of a run, by an agent that starts them again when they fail or when their number changes.

    Attributes:
        directory: of this machine, made before the first attempt and removed when the run has ended. It is in memory
            where the machine has such a place; other machines of the run do not see it.
        number: 0 for the first start.
    """

    directory: Path
    number: int

    @staticmethod
    def current() -> Attempt | None:
        """That of this process; None where nobody would start it again."""
        if DIRECTORY not in os.environ:
            return None
        return Attempt(Path(os.environ[DIRECTORY]), int(os.environ.get(NUMBER, 0)))

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
