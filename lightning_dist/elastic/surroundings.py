"""What the elastic agent and its ranks change in a process, and how it is put back."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.process import parent_process

import torch

AGENT_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
"""What the agent tells a rank in its environment, beside all that begins with ``TORCHELASTIC_``."""


def leave_fork_server(environment: dict[str, str]) -> None:
    """Replaces what a rank has from the fork server by what a spawned one would have; no change for a spawned one.

    Args:
        environment: of the launching process. The server has that of the time when it was started.
    """
    # The server ignores Ctrl-C, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, value in environment.items():
        if name not in AGENT_VARIABLES and not name.startswith("TORCHELASTIC_"):
            os.environ[name] = value
    # Was read when torch was imported.
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if "numpy" in sys.modules:
        # Python reseeds its own generator after a fork, NumPy does not: without a seed all jobs would draw the same.
        sys.modules["numpy"].random.seed()


def end_with_launching_process() -> None:
    """Ends this rank when the launching process is gone, even by SIGKILL: a fork server would outlive it."""
    launching = parent_process()
    if launching is None:
        return

    def wait() -> None:
        launching.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="end with launching process", daemon=True).start()


@contextlib.contextmanager
def launch_environment(num_processes: int) -> Iterator[None]:
    """What the agent and the ranks read from the environment, for the time of the launch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = {
        # Ranks that start again would read the addresses of those before them from a store shared with the agent
        # (seen in torch 2.14: five of six restarts failed).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // num_processes))),
    }
    # The agent writes this one and leaves it behind.
    changed = [*settings, "TORCHELASTIC_SIGNALS_TO_HANDLE"]
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def quiet_agent() -> Iterator[None]:
    """Silences the agent, which logs a failing rank's traceback twice and every step of its own.

    Setting torch's own ``LOGLEVEL`` turns this off.
    """
    names = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing.spawn")
    loggers = [
        logging.getLogger(name)
        for name in list(logging.root.manager.loggerDict)
        if name.startswith(names) and "LOGLEVEL" not in os.environ
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def signal_handlers_restored() -> Iterator[None]:
    """Puts back the handlers of the caller: the agent installs its own and leaves them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    handled = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in handled}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def no_process_left() -> Iterator[None]:
    """Kills what the agent leaves running, for instance when a signal comes while it starts the ranks."""
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
            process.join()
