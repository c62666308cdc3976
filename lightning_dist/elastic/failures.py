"""What a failing rank leaves for the process that launched it, and what that raises."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import signal
import time
import traceback
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

_FOLDED = ("torch", "lightning", "pytorch_lightning", "hydra")
"""Packages of whose frames a short traceback shows the first and the last of a run only."""


class WorkerFailed(RuntimeError):
    """A rank raised or died, and the others were ended. When several ranks failed, this is the first: the others
    usually only lost their connection to it. Its text is the rank and that rank's own traceback, see
    :func:`short_traceback`.

    Attributes:
        rank: the rank that failed.
        exception: what it raised, or ``None`` if it died without raising or what it raised can't be pickled.
        traceback: its whole traceback as text; empty if it died without raising.
    """

    def __init__(
        self, rank: int, summary: str, short: str = "", traceback: str = "", exception: Exception | None = None
    ) -> None:
        super().__init__(f"rank {rank} {summary}" + (f"\n\n{short}" if short else ""))
        self.rank, self.traceback, self.exception = rank, traceback, exception


def short_traceback(error: BaseException, *, skip: int = 0) -> str:
    """The traceback of a caught exception, without what the user can't act on, and without so many outermost frames."""
    lines = ["Traceback (most recent call last):\n"]
    for package, run in itertools.groupby(traceback.extract_tb(error.__traceback__)[skip:], key=_folded_package):
        of_run = list(run)
        if package is None or len(of_run) <= 3:
            lines += traceback.format_list(of_run)
        else:
            first, last = traceback.format_list(of_run[:1]), traceback.format_list(of_run[-1:])
            lines += [*first, f"  ... {len(of_run) - 2} frames of {package} ...\n", *last]
    lines += traceback.format_exception_only(error)
    return "".join(lines).rstrip()


def _folded_package(frame: traceback.FrameSummary) -> str | None:
    _, found, path = frame.filename.partition(f"{os.sep}site-packages{os.sep}")
    package = path.split(os.sep)[0]
    return "libraries" if found and package in _FOLDED else None


@dataclass(frozen=True)
class Failure:
    """What a failing rank leaves for the launching process, in a file of the launch's directory."""

    rank: int
    attempt: int
    time: float
    summary: str
    short_traceback: str
    traceback: str

    @staticmethod
    def record(directory: Path, rank: int, attempt: int, error: Exception) -> None:
        """Writes the failure of this rank."""
        first_line = str(error).partition("\n")[0]
        summary, whole = f"failed: {type(error).__name__}: {first_line}", "".join(traceback.format_exception(error))
        short = short_traceback(error, skip=1)  # without the frame of _run_rank
        failure = Failure(rank, attempt, time.time(), summary, short, whole)
        # An exception that doesn't pickle is still told by its traceback.
        with contextlib.suppress(Exception):
            (directory / f"exception-{attempt}-{rank}.pickle").write_bytes(pickle.dumps(error))
        (directory / f"failure-{attempt}-{rank}.json").write_text(json.dumps(asdict(failure)))

    @staticmethod
    def first(directory: Path, attempt: int) -> Failure | None:
        """The first failure of an attempt, or ``None`` if no rank left one."""
        files = directory.glob(f"failure-{attempt}-*.json")
        return min((Failure(**json.loads(file.read_text())) for file in files), key=attrgetter("time"), default=None)

    def exception(self, directory: Path) -> Exception | None:
        """What the rank raised; None if it doesn't pickle."""
        try:
            return pickle.loads((directory / f"exception-{self.attempt}-{self.rank}.pickle").read_bytes())
        except Exception:
            return None


def first_failure(directory: Path, attempt: int, error: ChildFailedError) -> WorkerFailed:
    """The rank that failed first; the agent itself only knows which failed rank it saw first."""
    seen_rank, seen = error.get_first_failure()
    told = Failure.first(directory, attempt)
    # A rank that was killed can't tell: others then tell that they lost it. An abort is the reverse, a
    # communication library that lost another rank.
    was_killed = seen.exitcode < 0 and seen.exitcode != -signal.SIGABRT
    if told is None or (was_killed and told.rank != seen_rank):
        return WorkerFailed(seen_rank, _cause_of_death(seen))
    return WorkerFailed(told.rank, told.summary, told.short_traceback, told.traceback, told.exception(directory))


def _cause_of_death(failure: ProcessFailure) -> str:
    if failure.exitcode == -signal.SIGKILL:
        return "was killed (SIGKILL); the usual reason is that the machine ran out of memory"
    if failure.exitcode < 0:
        return f"was ended by {signal.Signals(-failure.exitcode).name}"
    return f"ended with exit code {failure.exitcode}, without an exception"
