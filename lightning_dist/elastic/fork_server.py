"""A process that holds the imports of a run, and from which its ranks are forked.

[Note: ranks from a fork server]
Importing torch and Lightning takes seconds, and every spawned rank would do it again after the process that starts it
has done it, at each restart too. :mod:`multiprocessing`'s fork server imports once, beside the main process; a rank
forked from it begins at once. The server runs no code but imports: it has one thread and no CUDA context, so forking it
is safe. It serves all launches of a process; each rank is still a process of its own.

This module imports nothing that is slow itself.
"""

from __future__ import annotations

import ast
import atexit
import os
import runpy
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from pathlib import Path

ALWAYS = ("lightning_dist", "lightning_dist.elastic.rank", "torch.utils.tensorboard")
"""Modules that every run needs."""

TRUSTED = ("lightning", "lightning_dist", "recipes", "torch", "torchmetrics")
"""Packages whose import starts no thread and no device. Anything else is imported by the ranks."""


def start(modules: Iterable[str] = ()) -> None:
    """Starts the fork server, if it does not run yet, and returns at once.

    Args:
        modules: to be imported by the server, those of :data:`TRUSTED` packages.
    """
    trusted = [module for module in modules if module.split(".")[0] in TRUSTED]
    forkserver.set_forkserver_preload(list(dict.fromkeys([*ALWAYS, *trusted])))
    with _environment_of_server():
        forkserver.ensure_running()
    atexit.register(_end)


def imported_by(script: Path) -> list[str]:
    """The modules that a script imports, without running it; none where it can't be read as Python."""
    try:
        tree = ast.parse(script.read_bytes())
    except (SyntaxError, ValueError):  # the ranks tell
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append(node.module)
    return found


@contextmanager
def _environment_of_server() -> Iterator[None]:
    """What the server inherits.

    One thread: a pool of threads that a library makes when it is imported would not survive the fork; ``launch`` gives
    the ranks their number. The import path: the server is handed it but leaves it unused (seen in Python 3.11). No
    Ctrl-C: the server would show a traceback of its own if it came during the imports.
    """
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    before = {name: os.environ.get(name) for name in settings}
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(settings)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _end() -> None:
    """Ends a server that still imports; otherwise it ends by itself, a few seconds after this process."""
    compat = Path(__file__).parent.parent / "compat" / "fork_server.py"
    pid = runpy.run_path(str(compat))["server_pid"]()  # an import would be one of the whole package
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
