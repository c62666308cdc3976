"""What an agent changes in the process that it runs in; a stack puts it back."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading

_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
"""That the agent hands on to the ranks."""


def in_memory() -> str | None:
    """A place for files in memory; None where the machine has none that can be written."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def prepare(num_processes: int, stack: contextlib.ExitStack) -> None:
    """Readies this process for an agent with so many ranks."""
    _set_environment(num_processes, stack)
    _silence_agent(stack)
    _end_processes(stack)


def _set_environment(num_processes: int, stack: contextlib.ExitStack) -> None:
    """Sets what the agent and the ranks read from the environment."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = {
        # Ranks that start again would read the addresses of those before them from a store shared with the agent
        # (seen in torch 2.14: five of six restarts failed).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # Machines have as many ranks each: what the agents would ask each other over a network that may be down.
        "TORCH_ELASTIC_WORKER_IDENTICAL": "1",
        "TORCHELASTIC_SIGNALS_TO_HANDLE": ",".join(_SIGNALS),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // num_processes))),
    }
    stack.callback(os.environ.update, {name: os.environ[name] for name in settings if name in os.environ})
    for name in settings:
        stack.callback(os.environ.pop, name, None)
    os.environ.update(settings)


def _silence_agent(stack: contextlib.ExitStack) -> None:
    """The agent logs a failing rank's traceback twice and every step of its own; torch's own ``LOGLEVEL`` lets it."""
    parts = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing.spawn")
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(parts) and "LOGLEVEL" not in os.environ:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)


def end_in_order(stack: contextlib.ExitStack) -> None:
    """Has signals that end this process unwind it first, until the agent installs handlers of its own, and leaves them;
    the stack puts back those of the caller.
    """
    for name in _SIGNALS:
        if threading.current_thread() is threading.main_thread() and hasattr(signal, name):
            number = getattr(signal, name)
            stack.callback(signal.signal, number, signal.getsignal(number))
            if name != "SIGINT":
                signal.signal(number, _exit)


def _exit(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _end_processes(stack: contextlib.ExitStack) -> None:
    """Kills what the agent leaves running, for instance when a signal comes while it starts the ranks."""
    before = set(multiprocessing.active_children())

    def kill() -> None:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
            process.join()

    stack.callback(kill)
