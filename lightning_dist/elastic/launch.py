"""launch: run a function on several ranks of this machine under torch.distributed's elastic agent.

[Note: why the elastic agent]
Lightning's own launcher replays ``sys.argv`` for every rank but the first. Under Hydra's multirun the second rank
then starts a sweep of its own (Lightning #11300, #15689). The agent instead starts all ranks from a function and its
arguments, watches them, ends the others when one fails, and can start them again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lightning_dist.elastic.failures import Failure, first_failure
from lightning_dist.elastic.surroundings import (
    end_with_launching_process,
    launch_environment,
    leave_fork_server,
    no_process_left,
    quiet_agent,
    signal_handlers_restored,
)

log = logging.getLogger(__name__)

MONITOR_INTERVAL = 0.05
"""Seconds between two looks of the agent at its ranks."""


def is_launched() -> bool:
    """Whether torchrun, :func:`launch` or SLURM started this process as one of several ranks.

    Such a process joins its group, it must not launch another one. An interactive SLURM shell is no rank.
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
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="lightning_dist-launch-"))
        stack.enter_context(launch_environment(num_processes))
        stack.enter_context(quiet_agent())
        stack.enter_context(signal_handlers_restored())
        stack.enter_context(no_process_left())
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
            monitor_interval=MONITOR_INTERVAL,
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
