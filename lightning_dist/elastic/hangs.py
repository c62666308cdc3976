"""A rank that does not come: what the others wait in is told, with the stacks of all ranks, and all end.

[Note: how a hang ends]
A thread on each rank looks at the thread that trains (:class:`Pulse`) and speaks with those of the other ranks over
the process group's store. Where a rank has waited in a collective for nearly as long as it may, its thread asks all
ranks where they are; each says so, also one that sleeps. When the timeout is over and it still waits, it tells the
verdict, which every rank reads. Those that were missed end at once. The others, which wait, get :data:`GRACE` seconds
to leave by the exception that their backend raises, where it does (gloo), and end then. A rank whose store does not
answer ends alone.

A rank that takes long while no other waits for it as long as the timeout is no hang.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lightning_dist.elastic.pulse import Pulse, Wait

GRACE = 5.0
"""Seconds in which ranks that waited may end by themselves."""
BEFORE = 5.0
"""Seconds before the timeout at which all ranks are asked; a quarter of the timeout where that is less."""

_TO_ANSWER = 2
"""Calls that all ranks have to answer."""


@dataclass(frozen=True)
class Answer:
    """Where a rank is.

    Attributes:
        collective: that it waits in; None where it waits in none.
        place: where it is, for a sentence.
        seconds: for which it has been there.
        step: what it trains or evaluates.
        stack: of the thread that trains.
    """

    collective: str | None
    place: str
    seconds: float
    step: str
    stack: str

    @staticmethod
    def of(pulse: Pulse, step: str) -> Answer:
        """That of this rank, now."""
        wait = pulse.wait()
        if wait is None:
            return Answer(None, pulse.place(), pulse.still, step, pulse.stack())
        return Answer(wait.collective, f"waits in {wait.collective}", wait.seconds, step, pulse.stack())


@dataclass(frozen=True)
class Verdict:
    """How a hang is told.

    Attributes:
        missing: the ranks that were waited for; none where ranks wait for each other.
        rank: that the failure is said of.
        summary: a sentence that goes on after ``"rank 1 "``.
        stacks: where each rank is, and its stack.
        told_by: the rank that waited.
    """

    missing: list[int]
    rank: int
    summary: str
    stacks: str
    told_by: int

    @staticmethod
    def of(rank: int, wait: Wait, answers: dict[int, Answer], num_ranks: int) -> Verdict:
        """Of a rank that waited, and what all ranks answered."""
        waiting = [other for other, answer in answers.items() if answer.collective is not None]
        missing = [other for other in range(num_ranks) if other not in waiting and other != rank]
        step = answers[rank].step if rank in answers else "a step"
        of = f"{wait.collective}, {step}"
        if missing:
            first = answers.get(missing[0])
            where = _SILENT if first is None else f"{first.place}, {first.seconds:.0f} s"
            others = f" Ranks {', '.join(map(str, missing[1:]))} did not come either." if missing[1:] else ""
            come = f"did not come to {of}, in which rank {rank} waited for {wait.seconds:.0f} s: it {where}.{others}"
        else:
            come = f"waited for {wait.seconds:.0f} s in {of}, and all other ranks in theirs: each for another"
        return Verdict(missing, missing[0] if missing else rank, come, _stacks(answers, num_ranks), rank)


_SILENT = "does not answer; its process is stopped or gone, or something in it never lets Python go on"


def _stacks(answers: dict[int, Answer], num_ranks: int) -> str:
    parts = []
    for rank in range(num_ranks):
        if (answer := answers.get(rank)) is None:
            parts.append(f"rank {rank} {_SILENT}")
        else:
            parts.append(f"rank {rank} {answer.place}, {answer.seconds:.0f} s, {answer.step}:\n{answer.stack}")
    return "\n\n".join(parts)


class Hangs:
    """Finds hangs of this rank, and answers about those that others found.

    Args:
        store: of the process group, for this thread alone.
        rank, num_ranks: in the world.
        timeout: seconds of a collective, where torch's flight recorder does not have it.
        pulse: of this rank.
        step: gives what is trained or evaluated, for a sentence.

    Communication: two questions to the store a call; from shortly before a timeout, one answer more.
    """

    def __init__(
        self, store: Any, rank: int, num_ranks: int, timeout: float, pulse: Pulse, step: Callable[[], str]
    ) -> None:
        self._store, self._rank, self._num_ranks, self._timeout = store, rank, num_ranks, timeout
        self._pulse, self._step = pulse, step
        self._round = 0
        self._wait: Wait | None = None
        self._misses = self._asked_for = 0
        self.asks = self.is_open = False
        """Whether this rank asked, and whether some rank did and has not told how it ended."""

    def talk(self, soon: float, failed: bool = False) -> Verdict | None:
        """Asks, answers, tells or hears, if it is time for any. Raises the RuntimeErrors of a store that is gone.

        Args:
            soon: seconds until the next call.
            failed: whether an exception has ended this rank's run, as a backend's own timeout does.
        """
        wait = self._waits_for(BEFORE)
        if wait is not None and not self.is_open:
            own = str(self._rank).encode()
            self.asks = self._store.compare_set(self._key("asked"), "", own.decode()) == own
        self.is_open = self.is_open or self._store.check([self._key("asked")])
        if not self.is_open:
            return None
        if not failed:
            self._store.set(self._key(f"answer/{self._rank}"), json.dumps(asdict(Answer.of(self._pulse, self._step()))))
        if self.asks:
            self._decide(wait, soon, failed)
        if not self._store.check([self._key("verdict")]):
            return None
        verdict = json.loads(self._store.get(self._key("verdict")))
        self._round, self.is_open, self.asks, self._wait = self._round + 1, False, False, None
        self._misses = self._asked_for = 0
        return Verdict(**verdict) if verdict else None

    def _decide(self, wait: Wait | None, soon: float, failed: bool) -> None:
        """Of the rank that asked."""
        self._wait, self._misses = wait or self._wait, 0 if wait is not None else self._misses + 1
        self._asked_for += 1
        is_over = failed or (wait is not None and wait.seconds > self._timeout_of(wait) - soon)
        if is_over and self._asked_for > _TO_ANSWER:
            told = Verdict.of(self._rank, self._wait or Wait("a collective", 0.0), self._answers(), self._num_ranks)
            self._store.set(self._key("verdict"), json.dumps(asdict(told)))
        elif self._misses > 1:  # the others came; at first it may have been the backend's own timeout
            self._store.set(self._key("verdict"), "null")

    def _answers(self) -> dict[int, Answer]:
        keys = {rank: self._key(f"answer/{rank}") for rank in range(self._num_ranks)}
        return {rank: Answer(**json.loads(self._store.get(k))) for rank, k in keys.items() if self._store.check([k])}

    def overdue(self) -> Verdict | None:
        """Of a rank that has waited too long, and heard nothing. Communication: none."""
        wait = self._waits_for(-GRACE)
        if wait is None:
            return None
        own = Answer.of(self._pulse, self._step())
        summary = f"waited for {wait.seconds:.0f} s in {wait.collective}, {own.step}; the others can't be asked"
        return Verdict([], self._rank, summary, own.stack, self._rank)

    def _waits_for(self, before: float) -> Wait | None:
        """The collective that this rank waits in, if so many seconds are left until its timeout."""
        if self._pulse.still < self._timeout / 2:
            return None
        wait = self._pulse.wait()
        if wait is None or wait.seconds < (timeout := self._timeout_of(wait)) - min(before, timeout / 4):
            return None
        return wait

    def _timeout_of(self, wait: Wait) -> float:
        return wait.timeout or self._timeout

    def _key(self, name: str) -> str:
        return f"{self._round}/{name}"
