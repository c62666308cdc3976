"""A process that imports what a job needs while Hydra's process still works, and from which the ranks are forked.

[Note: ranks from a fork server]
Importing torch and Lightning takes seconds, and every spawned rank would do it again after the process that starts it
has done it. :mod:`multiprocessing`'s fork server imports once, beside the main process; a rank forked from it begins at
once. The server runs no code but imports: it has one thread and no CUDA context, so forking it is safe. A sweep uses
one server for all its jobs; each rank is still a process of its own.

This module imports nothing that is slow itself.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from typing import Any

from omegaconf import DictConfig, OmegaConf

ALWAYS = ("lightning_dist.elastic", "recipes.job", "torch.utils.tensorboard")
"""Modules that every job needs."""

TRUSTED = ("lightning", "lightning_dist", "recipes", "torch", "torchmetrics")
"""Packages whose import starts no thread and no device. Anything else is imported by the ranks."""


def start(cfg: DictConfig) -> None:
    """Starts the fork server, if it does not run yet, and returns at once.

    Args:
        cfg: the config of the job; modules of its ``_target_`` are imported by the server.
    """
    named = _target_modules(OmegaConf.to_container(cfg, resolve=False))
    trusted = [module for module in named if module.split(".")[0] in TRUSTED]
    forkserver.set_forkserver_preload(list(dict.fromkeys([*ALWAYS, *trusted])))
    with _environment_of_server():
        forkserver.ensure_running()
    atexit.register(_end)


def _target_modules(node: Any) -> Iterator[str]:
    """The module of each ``_target_`` in a config."""
    if isinstance(node, dict):
        yield str(node.get("_target_")).rpartition(".")[0]
        node = list(node.values())
    for item in node if isinstance(node, list) else ():
        yield from _target_modules(item)


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
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]  # not public (seen in Python 3.11)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
