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
from typing import ClassVar

import torch.distributed as dist

from lightning_dist.elastic.attempt import Attempt

_FOLDED = ("torch", "lightning", "pytorch_lightning", "hydra")
"""Packages of whose frames a short traceback shows the first and the last of a run only."""

_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
"""Gloo's words (seen in torch 2.14)."""


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

    launch: ClassVar[Attempt | None] = None
    """That of this process, where :func:`launch` started it as a rank, restarts or none."""

    rank: int
    attempt: int
    time: float
    summary: str
    short_traceback: str
    traceback: str
    is_of_lost_peer: bool = False
    """Whether this rank may only have lost the connection to another one."""

    @staticmethod
    def record(directory: Path, rank: int, attempt: int, error: BaseException) -> None:
        """Writes the failure of this rank."""
        first_line = str(error).partition("\n")[0]
        summary, whole = f"failed: {type(error).__name__}: {first_line}", "".join(traceback.format_exception(error))
        short = short_traceback(error, skip=1)  # without the frame of _run_rank
        lost = is_of_lost_peer(error) or isinstance(error, dist.DistError)
        failure = Failure(rank, attempt, time.time(), summary, short, whole, lost)
        # An exception that doesn't pickle is still told by its traceback.
        with contextlib.suppress(Exception):
            (directory / f"exception-{attempt}-{rank}.pickle").write_bytes(pickle.dumps(error))
        failure.write(directory)

    def write(self, directory: Path) -> None:
        """Leaves it for the launching process."""
        (directory / f"failure-{self.attempt}-{self.rank}.json").write_text(json.dumps(asdict(self)))

    @staticmethod
    def first(directory: Path, attempt: int) -> Failure | None:
        """The first failure of an attempt that is not another one's, or ``None`` if no rank left one."""
        files = directory.glob(f"failure-{attempt}-*.json")
        failures = [Failure(**json.loads(file.read_text())) for file in files]
        return min(failures, key=attrgetter("is_of_lost_peer", "time"), default=None)

    def exception(self, directory: Path) -> Exception | None:
        """What the rank raised; None if it doesn't pickle."""
        try:
            return pickle.loads((directory / f"exception-{self.attempt}-{self.rank}.pickle").read_bytes())
        except Exception:
            return None


def record_preempted(directory: Path, attempt: int, rank: int) -> None:
    """This rank leaves to be started again later, which is no failure."""
    (directory / f"preempted-{attempt}-{rank}").touch()


def was_preempted(directory: Path, attempt: int) -> bool:
    """Whether a rank of this attempt left to be started again later."""
    return any(directory.glob(f"preempted-{attempt}-*"))


def first_failure(directory: Path, attempt: int, seen_rank: int, exit_code: int) -> WorkerFailed:
    """The rank that failed first; the agent itself only knows which failed rank it saw first, and its exit code."""
    told = Failure.first(directory, attempt)
    # A rank that was killed can't tell: others then tell that they lost it.
    if told is None or (was_killed(exit_code) and told.rank != seen_rank):
        return WorkerFailed(seen_rank, _cause_of_death(exit_code))
    return WorkerFailed(told.rank, told.summary, told.short_traceback, told.traceback, told.exception(directory))


def was_killed(exit_code: int) -> bool:
    """Whether an exit code tells of a signal from outside. An abort is the reverse, a communication library that lost
    another rank.
    """
    return exit_code < 0 and exit_code != -signal.SIGABRT


def is_of_lost_peer(exception: BaseException) -> bool:
    """Whether a rank raised this when it lost the connection to another one."""
    return isinstance(exception, RuntimeError) and any(words in str(exception) for words in _LOST)


def _cause_of_death(exit_code: int) -> str:
    if exit_code == -signal.SIGKILL:
        return "was killed (SIGKILL); the usual reason is that the machine ran out of memory"
    if exit_code < 0:
        return f"was ended by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}, without an exception"
