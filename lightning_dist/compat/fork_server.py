"""A private name of Python's fork server. Run from its file, before this package is imported; imports nothing slow."""

from __future__ import annotations

from multiprocessing import forkserver


def server_pid() -> int | None:
    """The process that ``forkserver.ensure_running`` started here, which has no public name (seen in Python 3.11)."""
    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid
