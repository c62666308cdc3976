"""Where ranks stop that take batches without agreeing after each: all after the same one."""

from __future__ import annotations

import time
from typing import Any

POLL = 0.5
"""Seconds between two questions of a rank whether another one was asked to stop."""
_TO_THE_END = 2**62


class StopPoint:
    """The batch after which all ranks stop, once one of them is asked to; found at the store, without a collective.

    [Note: how a common batch is found]
    Ranks may be at different batches, and one may wait in a batch for another. So nobody waits before a batch. A rank
    that was asked says so at the store; each rank that sees it says, before each further batch, by which batch it will
    have finished: the next one. When all have said so once, the last of them closes the talks, and only then reads what
    each said last: the largest is where all stop. A rank that speaks after that sees that the talks are closed before
    it begins its batch, and has begun none beyond what was read. The only wait is for those reads.

    A rank at its last batch says that it goes to the end, where it may communicate: then all do.

    Communication: none, but with the store: a question each :data:`POLL` seconds, and while ranks talk, three a batch.

    Args:
        store: of the process group.
        key: of this stop, the same on all ranks and used once.
        rank, num_ranks: in the process group.
    """

    def __init__(self, store: Any, key: str, rank: int, num_ranks: int) -> None:
        self._store, self._key, self._rank, self._num_ranks = store, key, rank, num_ranks
        self._talks, self._asked_at = False, time.monotonic()

    def is_reached(self, done: int, is_last: bool, asked: bool) -> bool:
        """Whether to stop now, after so many batches; every rank calls it after each of its batches.

        Args:
            done: batches that this rank has finished.
            is_last: whether it has no other.
            asked: whether this rank itself was asked to stop.
        """
        store, first = self._store, not self._talks
        if first and not self._begins_to_talk(asked):
            return False
        store.set(f"{self._key}/{self._rank}", str(_TO_THE_END if is_last else done + 1))
        if first and store.add(f"{self._key}/talking", 1) == self._num_ranks:
            self._close()
        if not store.check([f"{self._key}/closed"]):
            return False
        return done >= int(store.get(f"{self._key}/stop"))

    def _begins_to_talk(self, asked: bool) -> bool:
        if asked:
            self._store.set(f"{self._key}/asked", "1")
        elif (now := time.monotonic()) - self._asked_at < POLL:
            return False
        else:
            self._asked_at = now
            asked = self._store.check([f"{self._key}/asked"])
        self._talks = asked
        return asked

    def _close(self) -> None:
        self._store.set(f"{self._key}/closed", "1")
        said = [int(self._store.get(f"{self._key}/{rank}")) for rank in range(self._num_ranks)]
        self._store.set(f"{self._key}/stop", str(max(said)))
