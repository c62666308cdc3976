"""From which state a fit goes on in a later attempt: the newest that this run wrote.

[Note: the number of a fit]
A restarted script runs from its top: what it did before is known by order alone. So states are kept by the number of
the fit in the process. A fit that had ended goes on from its last state too, which has little or nothing left to train;
one that wrote none runs again, as one that was never reached does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_dist.elastic.attempt import Attempt


class Fits:
    """Counts the fits of this process; see [Note: the number of a fit]. State of the process, as its attempt is."""

    begun: ClassVar[int] = 0
    has_stepped: ClassVar[bool] = False
    """Whether one has finished a step."""

    @staticmethod
    def begin() -> int:
        """The number of one that begins, from 0."""
        Fits.begun += 1
        return Fits.begun - 1


@dataclass(frozen=True)
class SavedState:
    """A checkpoint that a run recorded when it was complete (the event ``checkpoint``).

    Attributes:
        path: as it was saved; local or a URL.
        step: optimizer steps that were done (``trainer.global_step``).
        batches: that were seen by then, of all epochs.
        time: when the state was taken, in seconds since the epoch; a save in the background ends later.
    """

    path: str
    step: int
    batches: int
    time: float


def saved_states(attempt: Attempt, fit: int) -> list[SavedState]:
    """What processes of this machine recorded of a fit, newest first, each path once."""
    states: dict[str, SavedState] = {}
    for event in attempt.events():
        if event["event"] == "checkpoint" and event["fit"] == fit:
            states[event["path"]] = SavedState(event["path"], event["step"], event["batches"], event["time"])
    return sorted(states.values(), key=lambda state: state.time, reverse=True)


def newest_states(states: list[SavedState], is_there: Callable[[str], bool]) -> list[SavedState]:
    """Of what several machines recorded, that which has not been removed since, newest first."""
    ordered = sorted({state.path: state for state in states}.values(), key=lambda state: state.time, reverse=True)
    return [state for state in ordered if is_there(state.path)]


def record_state(attempt: Attempt, fit: int, path: Any, step: int, batches: int, taken: float) -> None:
    """On a rank: a checkpoint is complete, of a state that was taken then, in seconds since the epoch."""
    attempt.record("checkpoint", fit=fit, path=str(path), step=step, batches=batches, time=taken)
