"""launch: run a function on several ranks of this machine under torch.distributed's elastic agent.

[Note: why the elastic agent]
Lightning's own launcher replays ``sys.argv`` for every rank but the first. Under Hydra's multirun the second rank
then starts a sweep of its own (Lightning #11300, #15689). The agent instead starts all ranks from a function and its
arguments, watches them, ends the others when one fails, and can start them again.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable
from multiprocessing.process import parent_process
from pathlib import Path
from typing import Any

import torch.distributed
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lightning_dist.elastic.attempt import DIRECTORY, NUMBER
from lightning_dist.elastic.failures import Failure, first_failure

log = logging.getLogger(__name__)

_AGENT_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
"""What the agent tells a rank in its environment, beside all that begins with ``TORCHELASTIC_``."""


def is_launched() -> bool:
    """Whether torchrun, :func:`launch` or SLURM started this process as one of several ranks, which join their group
    and must not launch another one. An interactive SLURM shell is no rank.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return True
    in_job_step = "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1
    return in_job_step and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def launch(
    worker: Callable[..., Any],
    *args: Any,
    num_processes: int,
    max_restarts: int = 0,
    start_method: str = "spawn",
    shutdown_timeout: int = 10,
) -> list[Any]:
    """Calls ``worker(*args)`` in ``num_processes`` new processes and waits for their results.

    Every process finds its rank where torchrun would have put it (``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``,
    ``MASTER_ADDR``, ``MASTER_PORT``, ``TORCHELASTIC_RESTART_COUNT``), so Lightning and
    ``torch.distributed.init_process_group()`` join the group without arguments. ``OMP_NUM_THREADS`` is set to the
    cores per rank unless it is set already. All processes have ended when this returns or raises.

    Args:
        worker: a function that can be imported by its module and name (not a lambda or a local function).
        args: its arguments; they and the result are pickled.
        num_processes: the ranks to start.
        max_restarts: how often all ranks are started again after one of them failed.
        start_method: how to start processes, as in :mod:`multiprocessing`; only ``"spawn"`` and ``"forkserver"``
            are safe with accelerators. A fork server with preloaded modules starts ranks fastest; they get this
            process's environment, but what its modules read when they were imported stays.
        shutdown_timeout: seconds that the ranks have to end themselves after a signal, before they are killed.

    Returns:
        what ``worker`` returned, by rank.

    Raises:
        WorkerFailed: a rank raised or died, ``max_restarts`` times after the first.
        KeyboardInterrupt: this process got SIGINT; the ranks got it too.
        SystemExit: this process got another signal that ends it (SIGTERM, SIGHUP, SIGQUIT).
        ValueError: ``num_processes`` or ``max_restarts`` is too small.
    """
    if num_processes < 1:
        raise ValueError(f"launch needs at least one process, got num_processes={num_processes}")
    if max_restarts < 0:
        raise ValueError(f"launch can't restart {max_restarts} times; pass max_restarts=0 to never restart")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="lightning_dist-launch-", dir=_in_memory()))
        _set_environment(num_processes, stack)
        _silence_agent(stack)
        _keep_signal_handlers(stack)
        _end_processes(stack)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=f"launch-{uuid.uuid4().hex}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            # Without it the agent looks up this machine's full name, which containers often can't resolve.
            local_addr="localhost",
            max_restarts=max_restarts,
            monitor_interval=0.05,
            start_method=start_method,
            shutdown_timeout=shutdown_timeout,
            logs_specs=DefaultLogsSpecs(log_dir=directory),
        )
        try:
            results = elastic_launch(config, _run_rank)((worker, args, directory, dict(os.environ)))
        except ChildFailedError as error:
            raise first_failure(Path(directory), max_restarts, error) from None
        except SignalException as error:
            # It is an Exception: Hydra, for one, would take it for a failed job and go on with the sweep.
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
    return [results[rank] for rank in range(num_processes)]


def _run_rank(call: tuple[Callable[..., Any], tuple[Any, ...], str, dict[str, str]]) -> Any:
    worker, args, directory, environment = call
    end_with_launching_process()
    leave_fork_server(environment)
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    os.environ.update({DIRECTORY: directory, NUMBER: str(attempt)})
    if attempt and rank == 0:
        reason = Failure.first(Path(directory), attempt - 1)
        told = f"rank {reason.rank} {reason.summary}" if reason else "a rank died without an exception"
        log.warning("starting all ranks again (restart %d): %s", attempt, told)
    try:
        result = worker(*args)
    except Exception as error:
        Failure.record(Path(directory), rank, attempt, error)
        raise
    leave_process_group()
    return result


def leave_process_group() -> None:
    """Ends this rank's process group, if it is in one, while nothing else ends: a rank that leaves that to the end of
    Python may abort there ("terminate called without an active exception", seen in torch 2.14 under torchrun).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _in_memory() -> str | None:
    """A place for files in memory; None where the machine has none that can be written."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


# What agent and ranks change in a process; the stack puts it back


def leave_fork_server(environment: dict[str, str]) -> None:
    """Gives a rank what a spawned one has of the launching process, in place of what the fork server had."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores Ctrl-C, and so would its children
    of_agent = {name for name in environment if name in _AGENT_VARIABLES or name.startswith("TORCHELASTIC_")}
    os.environ.update({name: value for name, value in environment.items() if name not in of_agent})
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # was read when torch was imported
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


def _set_environment(num_processes: int, stack: contextlib.ExitStack) -> None:
    """Sets what the agent and the ranks read from the environment."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = {
        # Ranks that start again would read the addresses of those before them from a store shared with the agent
        # (seen in torch 2.14: five of six restarts failed).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // num_processes))),
    }
    changed = [*settings, "TORCHELASTIC_SIGNALS_TO_HANDLE"]  # the agent writes this one and leaves it behind
    stack.callback(os.environ.update, {name: os.environ[name] for name in changed if name in os.environ})
    for name in changed:
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


def _keep_signal_handlers(stack: contextlib.ExitStack) -> None:
    """Puts back the handlers of the caller: the agent installs its own and leaves them."""
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"):
        if threading.current_thread() is threading.main_thread() and hasattr(signal, name):
            number = getattr(signal, name)
            stack.callback(signal.signal, number, signal.getsignal(number))


def _end_processes(stack: contextlib.ExitStack) -> None:
    """Kills what the agent leaves running, for instance when a signal comes while it starts the ranks."""
    before = set(multiprocessing.active_children())

    def kill() -> None:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
            process.join()

    stack.callback(kill)
