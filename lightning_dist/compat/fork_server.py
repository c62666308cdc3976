"""Private names of Python's fork server. Run from its file, before this package is imported; imports nothing slow."""

from __future__ import annotations

from multiprocessing import forkserver
from typing import Any

_SERVER: Any = forkserver._forkserver


def server_pid() -> int | None:
    """The process that ``forkserver.ensure_running`` started here, which has no public name (seen in Python 3.11)."""
    pid: int | None = _SERVER._forkserver_pid
    return pid


def server_address() -> dict[str, Any]:
    """How a process that this one's server forks finds the server, for :func:`use_server`."""
    names = "_forkserver_address", "_forkserver_authkey"  # the key since Python 3.14
    return {name: getattr(_SERVER, name) for name in names if hasattr(_SERVER, name)}


def use_server(address: dict[str, Any]) -> None:
    """Has this process, which a server forked, start its own by the same server; it would begin another one, although
    Python's comments say otherwise (seen in Python 3.11).
    """
    for name, value in address.items():
        setattr(_SERVER, name, value)
    _SERVER.ensure_running = forkserver.ensure_running = lambda: None
