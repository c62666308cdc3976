"""Whether a job of a sweep runs: its process holds a lock as long as it lives, however it ends."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipes.config_errors import ConfigError

LOCK = ".running"
"""The file that is locked, in the directory of a job; it says where the job runs."""

HANDED_ON = ".handed_on"
"""In its place, the file of a job that waits or runs elsewhere."""

PATIENCE = 1.0
"""Seconds within which those let go of the lock who only look whether somebody has it."""


@contextmanager
def running(directory: Path) -> Iterator[None]:
    """The job of a directory runs in this process. A file system that has no locks is no hindrance.

    Raises:
        ConfigError: it runs in another one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("a+") as file:
        deadline = time.monotonic() + PATIENCE
        while _is_held(file.fileno(), alone=True):
            if time.monotonic() > deadline:
                raise ConfigError(_told(directory))
            time.sleep(0.05)
        (directory / HANDED_ON).unlink(missing_ok=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def hand_on(directory: Path, to: str) -> None:
    """The job of a directory will run elsewhere, where nobody sees its lock.

    Args:
        directory: of the job.
        to: the launcher that was given it.
    """
    (directory / HANDED_ON).write_text(f"to launcher={to}\n")
    (directory / LOCK).unlink(missing_ok=True)


def refuse_handed_on(directory: Path) -> None:
    """Raises a ConfigError if the job of a directory was handed on, to one who has not told yet how it ended."""
    mark = directory / HANDED_ON
    if mark.is_file():
        raise ConfigError(
            f"{directory} has a job that was handed on ({mark.read_text().strip()}) and has not ended, so it may wait "
            f"or run there; wait for its end, or if it is gone remove {HANDED_ON} in its directory or pass resume=false"
        )


def is_running(directory: Path) -> bool | None:
    """Whether the job of a directory runs; None where it was handed on, or can't be said."""
    try:
        with (directory / LOCK).open("r+") as file:
            return _is_held(file.fileno(), alone=False)
    except OSError:
        return None


def refuse_running(directory: Path) -> None:
    """Raises a ConfigError if the job of a directory runs, which nobody else can run then."""
    if is_running(directory):
        raise ConfigError(_told(directory))


def _told(directory: Path) -> str:
    where = (directory / LOCK).read_text().strip()
    return f"{directory} has a job that still runs ({where}); wait for its end, or pass another hydra.sweep.dir"


def _is_held(descriptor: int, alone: bool) -> bool | None:
    """Whether another has the lock of a file; else it is taken until the file is closed, alone or with others who look.
    None where the system has no locks.

    ``flock``, not ``lockf``, which does not hinder the process that has it: one may run jobs and look at them.
    """
    try:
        import fcntl  # not on every system

        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return None
    return False
