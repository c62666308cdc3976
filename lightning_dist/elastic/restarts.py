"""Whether ranks that failed are started again.

[Note: what is tried again]
A rank that was killed, or that lost another one, may do better the next time, always. An exception of the code, or an
exit of its own, mostly comes again: before any step of an attempt it ends the run, and a second time at the same place
too. What is left, an exception after some steps, is tried once more.
"""

from __future__ import annotations

from lightning_dist.elastic.attempt import Place
from lightning_dist.elastic.failures import Failure, was_killed


class Restarts:
    """Decides by how the attempts before ended; see [Note: what is tried again]."""

    def __init__(self) -> None:
        self._before: tuple[str, int, int] | None = None

    def are_of_use(self, exit_code: int, told: Failure | None, reached: Place | None) -> bool:
        """An attempt has failed.

        Args:
            exit_code: of the rank that failed first.
            told: the exception that ended a rank; None where all died without one.
            reached: how far the attempt came; None where no step finished.
        """
        is_of_lost_peer = told is not None and told.is_of_lost_peer
        if was_killed(exit_code) or is_of_lost_peer or (exit_code < 0 and told is None):
            return True
        if reached is None:
            return False
        this = (told.summary if told else f"exit code {exit_code}"), reached.fit, reached.step
        before, self._before = self._before, this
        return this != before
