"""What a job leaves in its directory: how it ended."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

RESULT = "result.json"

NOT_ENDED = "it has not ended"
"""The error of a job that runs, or that was ended from outside before it could say how."""


@dataclass(frozen=True)
class JobResult:
    """How a job ended; written to ``result.json`` in its directory, when it begins too.

    Args:
        overrides: what the command line changed.
        error: the first line of what went wrong, ``None`` for a job that came to its end.
        metrics: the logged metrics by name.
        optimized_metric: the name of the metric that the sweep is about, if any.
    """

    overrides: list[str]
    error: str | None
    metrics: dict[str, float]
    optimized_metric: str | None = None

    def save(self, directory: Path) -> None:
        """Writes the result to the job's directory, at once: who reads it finds this one or the one before."""
        directory.mkdir(parents=True, exist_ok=True)
        new = directory / f".{RESULT}"
        new.write_text(json.dumps(asdict(self), indent=2) + "\n")
        new.replace(directory / RESULT)

    @classmethod
    def load(cls, file: Path) -> JobResult:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: something else is in the file, which has a common name.
        """
        values = json.loads(file.read_text())
        try:
            return cls(**values)
        except TypeError:
            raise ValueError(f"{file} is not what a job leaves") from None

    @classmethod
    def of(cls, directory: Path) -> JobResult | None:
        """That of a job's directory; None where no job has begun there."""
        try:
            return cls.load(directory / RESULT)
        except (FileNotFoundError, IsADirectoryError, ValueError):
            return None
