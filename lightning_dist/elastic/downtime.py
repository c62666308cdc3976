"""What a restart cost: steps, and seconds in each of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_dist.elastic.attempt import Attempt

_PARTS = {"end": "ended", "start": "up", "form": "formed", "load": "loaded", "first step": "first_step"}
"""Each part of a restart, with the event that ends it."""


@dataclass(frozen=True)
class Downtime:
    """Of one attempt, up to its first step.

    Attributes:
        fit: the number of the fit.
        step: from which training goes on.
        lost: steps that had finished after it, and are taken again.
        parts: seconds, by part: from the last step before until all ranks had ended, until all were up, until they had
            formed process groups, until all was restored, and until the first step had finished.
    """

    fit: int
    step: int
    lost: int
    parts: dict[str, float]

    @staticmethod
    def of(attempt: Attempt, fit: int, step: int) -> Downtime | None:
        """That of an attempt whose first step has finished; None where this machine did not see how the one before
        ended. ``step`` is the one from which it went on.
        """
        events = attempt.events()
        before = [e for e in events if e["event"] == "ended" and e["attempt"] == attempt.number - 1]
        if not before:
            return None
        reached: dict[str, Any] = before[-1]
        since = reached.get("last", reached["time"])
        times, parts = {e["event"]: e["time"] for e in events if e["attempt"] == attempt.number}, {}
        times["ended"] = reached["time"]
        for part, event in _PARTS.items():
            parts[part] = times[event] - since
            since = times[event]
        lost = max(0, reached.get("step", 0) - step) if reached.get("fit") == fit else 0
        return Downtime(fit, step, lost, parts)

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        """What the log says."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
        return (
            f"Gone on from step {self.step} of fit {self.fit}; {self.lost} steps are lost. From the last one before to "
            f"the first one again: {self.seconds:.1f} s ({parts})"
        )
