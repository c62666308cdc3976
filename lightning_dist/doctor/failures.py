"""How ranks failed, in one sentence: the first of them, in words that say what would do."""

from __future__ import annotations

import errno
import re
import signal
import time
import traceback
from dataclasses import dataclass
from operator import attrgetter

from lightning_dist.doctor.results import CheckFailed, Details

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DISK = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|PytorchStreamWriter failed writing", re.I
)
_TIMED_OUT = re.compile(r"Timed out waiting|collective operation timeout|timed out after|Operation timed out", re.I)
_LOST = re.compile(
    r"Connection closed by peer|Connection reset|Broken pipe|remote process exited|ncclRemoteError", re.I
)


@dataclass(frozen=True)
class RankFailure:
    """How one rank failed.

    Args:
        rank: that failed.
        time: of the machine's clock.
        reason: one sentence.
        trace: the traceback, or what the rank said last.
        is_sentence: the reason is one that the checks know, in their words.
        lost_others: it only lost its connection to another rank.
        details: of the check.
    """

    rank: int
    time: float
    reason: str
    trace: str = ""
    is_sentence: bool = False
    lost_others: bool = False
    details: Details | None = None

    @classmethod
    def of(cls, rank: int, error: BaseException) -> RankFailure:
        """Of an exception."""
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, CheckFailed):
            return cls(rank, time.time(), error.reason, trace, True, details=error.details)
        known = _known_reason(error, trace)
        first_line = str(error).strip().partition("\n")[0]
        reason = known or f"rank {rank} raised {type(error).__name__}: {first_line}"
        return cls(rank, time.time(), reason, trace, known is not None, known is None and bool(_LOST.search(trace)))

    @classmethod
    def of_death(cls, rank: int, status: int | None, said: str) -> RankFailure:
        """Of a process that ended without an answer.

        Args:
            rank: that ended.
            status: exit status; negative for a signal.
            said: the end of its output.
        """
        how = f"by {signal.Signals(-status).name}" if status is not None and status < 0 else f"with status {status}"
        known = _known_reason(None, said)
        killed = "; the usual reason is that the machine ran out of memory" if status == -signal.SIGKILL else ""
        return cls(rank, time.time(), known or f"rank {rank} ended {how}{killed}", said[-2000:], known is not None)


def _known_reason(error: BaseException | None, text: str) -> str | None:
    if _is_full_disk(error) or _DISK.search(text):
        return (
            "the disk takes no more: a file could not be written (no space, quota or a limit of file sizes); free "
            "some, or pass --directory on another disk"
        )
    if _TIMED_OUT.search(text):
        return (
            "a collective timed out: a rank came late or not at all, or the process group's timeout is too short; a "
            "longer one is HybridStrategy(timeout=timedelta(minutes=30))"
        )
    return None


def _is_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return True
        error = error.__cause__ or error.__context__
    return False


def failures_told(failures: list[RankFailure], silent: list[int]) -> CheckFailed:
    """The first failure that is no echo of another one."""
    first = min(failures, key=lambda failure: (failure.lost_others, not failure.is_sentence, failure.time))
    others = sorted(failure.rank for failure in failures if failure.rank != first.rank)
    reason = first.reason + (f"; ranks {silent} did not end by themselves" if silent else "")
    traces = {f"rank {f.rank}": f.trace[-4000:] for f in sorted(failures, key=attrgetter("rank"))}
    return CheckFailed(reason, {**(first.details or {}), "rank": first.rank, "also failed": others, "traces": traces})


def silence_told(stacks: dict[int, list[str]], timeout: float) -> CheckFailed:
    """Which ranks gave no answer, and where they stand.

    Args:
        stacks: of those ranks, the innermost call first.
        timeout: seconds.
    """
    ranks = list(stacks)
    where = "; ".join(f"rank {rank} is in {frames[0]}" for rank, frames in stacks.items() if frames)
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    reason = f"{who} gave no answer in {timeout:g} s" + (f": {where}" if where else "")
    return CheckFailed(reason, {"silent": ranks, "stacks": {f"rank {r}": frames[:30] for r, frames in stacks.items()}})
