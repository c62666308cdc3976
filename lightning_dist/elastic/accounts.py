"""What a run that was started again spent its time on: how much of it trained what was kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TRAIN, AGAIN, END, START, FORM, LOAD, FIRST = "train", "lost", "end", "start", "form", "load", "first step"
PARTS = {
    TRAIN: "training that was kept",
    AGAIN: "training that was lost, and done again",
    END: "until all ranks had ended",
    START: "until all ranks were up",
    FORM: "until they had formed process groups",
    LOAD: "until all was built and restored",
    FIRST: "the first step",
}
"""Parts of a run, and what each is."""
_REACHED = {START: "up", FORM: "formed", LOAD: "loaded", FIRST: "first_step"}
"""The event that ends each part of a start."""


@dataclass(frozen=True)
class Span:
    """A part of an attempt: seconds since the run began."""

    part: str
    attempt: int
    begin: float
    end: float


@dataclass(frozen=True)
class Accounts:
    """Of a run, as one of its machines saw it.

    Attributes:
        spans: in the order of time; together they are the whole run.
        lost: steps that were taken again.
    """

    spans: list[Span]
    lost: int

    @staticmethod
    def of(events: Sequence[Mapping[str, Any]], end: float, last: Mapping[str, Any] | None = None) -> Accounts | None:
        """From what was recorded until the run ended; None where no attempt began.

        Args:
            events: of :meth:`Attempt.events`.
            end: when the run ended, in seconds since the epoch.
            last: where the last attempt came, as an ``ended`` event says it: ``fit``, ``step`` and ``last``, the time.
        """
        begins = [event for event in events if event["event"] == "start"]
        if not begins:
            return None
        zero, spans, lost = begins[0]["time"], list[Span](), 0
        for begin, following in zip(begins, [*begins[1:], None], strict=True):
            number = begin["attempt"]
            own = {event["event"]: event for event in events if event["attempt"] == number}
            until = end if following is None else following["time"]
            reached = own.get("ended") or {"time": end, **(last or {})}
            next_own = {} if following is None else _of_attempt(events, following["attempt"])
            again, share = _lost(own, reached, next_own)
            lost += again
            spans += [
                Span(part, number, since - zero, till - zero)
                for part, since, till in _spans(own, begin["time"], until, reached, share)
                if till > since
            ]
        return Accounts(spans, lost)

    @property
    def seconds(self) -> dict[str, float]:
        """By part."""
        return {part: sum(s.end - s.begin for s in self.spans if s.part == part) for part in PARTS}

    @property
    def useful(self) -> float:
        """Share of the time in which steps were trained that were kept."""
        seconds = self.seconds
        return seconds[TRAIN] / max(sum(seconds.values()), 1e-9)

    def __str__(self) -> str:
        """What the log says."""
        seconds, total = self.seconds, sum(self.seconds.values())
        parts = ", ".join(f"{part} {seconds[part]:.1f}" for part in PARTS if seconds[part])
        attempts = 1 + self.spans[-1].attempt - self.spans[0].attempt if self.spans else 0
        return (
            f"{self.useful:.1%} of the run trained what was kept: {seconds[TRAIN]:.1f} of {total:.1f} s in {attempts} "
            f"attempts; {self.lost} steps were lost ({parts})"
        )


def _of_attempt(events: Iterable[Mapping[str, Any]], number: int) -> dict[str, Mapping[str, Any]]:
    return {event["event"]: event for event in events if event["attempt"] == number}


def _lost(own: Mapping[str, Any], reached: Mapping[str, Any], following: Mapping[str, Any]) -> tuple[int, float]:
    """Steps of an attempt that the following one took again, and what share of all its steps they are."""
    if "step" not in reached or "first_step" not in own:
        return 0, 0.0
    begun = own["loaded"]["step"] if own.get("loaded", {}).get("fit") == reached["fit"] else 0
    steps = max(1, reached["step"] - begun)
    if not following:
        return 0, 0.0
    loaded = following.get("loaded")
    kept = loaded["step"] if loaded is not None and loaded["fit"] == reached["fit"] else reached["step"]
    again = min(max(0, reached["step"] - kept), steps)
    return again, again / steps


def _spans(
    own: Mapping[str, Any], begin: float, until: float, reached: Mapping[str, Any], share: float
) -> Iterable[tuple[str, float, float]]:
    """Parts of an attempt, with the times at which they begin and end."""
    since = begin
    for part, event in _REACHED.items():
        if event not in own:  # it ended before
            yield part, since, min(max(reached["time"], since), until)
            yield END, min(max(reached["time"], since), until), until
            return
        yield part, since, own[event]["time"]
        since = own[event]["time"]
    last = max(since, reached.get("last", since))
    kept = last - share * (last - since)
    yield TRAIN, since, kept
    yield AGAIN, kept, last
    yield END, last, until
