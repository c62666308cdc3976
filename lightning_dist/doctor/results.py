"""What a check gives: a line that is green, red or skipped, with one sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Details = dict[str, Any]
Status = Literal["ok", "failed", "skipped"]


class CheckFailed(Exception):
    """What was looked at is wrong.

    Args:
        reason: one sentence: what is wrong, and what would do.
        details: for the file; plain data.
    """

    def __init__(self, reason: str, details: Details | None = None) -> None:
        super().__init__(reason, details)
        self.reason, self.details = reason, details or {}


class CheckSkipped(Exception):
    """It can't be looked at here; the message says why."""


@dataclass(frozen=True)
class Finding:
    """What a check that went well found.

    Args:
        reason: one sentence.
        details: for the file; plain data.
    """

    reason: str
    details: Details = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Args:
        name: its kind, a word that ``--only`` and ``--skip`` take, and after a blank which one of them.
        run: raises :class:`CheckFailed` or :class:`CheckSkipped`.
    """

    name: str
    run: Callable[[], Finding]

    @property
    def kind(self) -> str:
        """The first word of its name."""
        return self.name.partition(" ")[0]


@dataclass(frozen=True)
class CheckResult:
    """The line of a check that has run. ``seconds`` is wall time."""

    name: str
    status: Status
    reason: str
    seconds: float = 0.0
    details: Details = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
