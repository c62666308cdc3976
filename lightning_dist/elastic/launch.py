"""Starts ranks on this machine from one process, with torch's elastic agent.

[Note: launching]
Lightning's own launcher replays ``sys.argv`` for every rank but the first. Under Hydra's multirun the second rank
then starts a sweep of its own (Lightning #11300, #15689). The agent instead starts all ranks from a function and its
arguments, watches them, ends the others when one fails, and can start them again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException

from lightning_dist.elastic import environment
from lightning_dist.elastic.accounts_picture import tell_accounts
from lightning_dist.elastic.agent import Agent, Call
from lightning_dist.elastic.attempt import Attempt
from lightning_dist.elastic.failures import WorkerFailed, was_preempted
from lightning_dist.elastic.rank import AGENT_LIVES, run_rank
from lightning_dist.elastic.rendezvous import Rendezvous
from lightning_dist.elastic.signals import REQUEUE_STATUS


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
    rendezvous: Rendezvous | None = None,
    start_method: str = "spawn",
    shutdown_timeout: int = 60,
) -> list[Any]:
    """Calls ``worker(*args)`` in ``num_processes`` new processes and waits for their results.

    Every process finds its rank where torchrun would have put it (``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``,
    ``MASTER_ADDR``, ``MASTER_PORT``, ``TORCHELASTIC_RESTART_COUNT``), so Lightning and
    ``torch.distributed.init_process_group()`` join the group without arguments. ``OMP_NUM_THREADS`` is set to the
    cores per rank unless it is set already. All processes have ended when this returns or raises.

    When a rank is killed, the others are too, at once; when one raises, the others have
    :data:`~lightning_dist.elastic.guard.GRACE` seconds to say what they met. Ranks that can be started again find an
    :class:`~lightning_dist.elastic.attempt.Attempt`, by which their fits go on from the newest state.

    Args:
        worker: a function that can be imported by its module and name (not a lambda or a local function).
        args: its arguments; they and the result are pickled.
        num_processes: the ranks to start on this machine.
        max_restarts: how often all ranks are started again after one of this machine's failed; see
            :class:`~lightning_dist.elastic.restarts.Restarts` for failures that are not tried again.
        rendezvous: where the agents of several machines meet, each of which calls this. Default: this machine alone.
        start_method: how to start processes, as in :mod:`multiprocessing`; only ``"spawn"`` and ``"forkserver"``
            are safe with accelerators. A fork server with preloaded modules starts ranks fastest; they get this
            process's environment, but what its modules read when they were imported stays.
        shutdown_timeout: seconds that the ranks have to end themselves after a signal, before they are killed: a fit
            then saves, so it must be long enough for that.

    Returns:
        what ``worker`` returned on the ranks of this machine, by rank.

    Raises:
        WorkerFailed: a rank raised or died, and no restart was left or of use.
        KeyboardInterrupt: this process got SIGINT; the ranks got it too.
        SystemExit: this process got another signal that ends it (SIGTERM, SIGHUP, SIGQUIT, SIGUSR1). With the status
            :data:`~lightning_dist.elastic.signals.REQUEUE_STATUS` where a rank of the last attempt left with that: the
            run was preempted, and a next one goes on.
        ValueError: ``num_processes`` or ``max_restarts`` is too small.
    """
    if num_processes < 1:
        raise ValueError(f"launch needs at least one process, got num_processes={num_processes}")
    if max_restarts < 0:
        raise ValueError(f"launch can't restart {max_restarts} times; pass max_restarts=0 to never restart")
    rendezvous = rendezvous or Rendezvous()
    with contextlib.ExitStack() as stack:
        environment.end_in_order(stack)
        place = tempfile.TemporaryDirectory(prefix="lightning_dist-launch-", dir=environment.in_memory())
        directory = Path(stack.enter_context(place))
        (directory / AGENT_LIVES).touch()
        environment.prepare(num_processes, stack)
        is_restarted = max_restarts > 0 or rendezvous.max_nodes > 1
        agent = Agent(
            run_rank,
            Call(worker, args, Attempt(directory, 0), is_restarted, dict(os.environ)),
            num_processes=num_processes,
            max_restarts=max_restarts,
            rendezvous=rendezvous,
            start_method=start_method,
            shutdown_timeout=shutdown_timeout,
        )
        try:
            results = agent.run_to_end()
        except SignalException as error:
            # It is an Exception: Hydra, for one, would take it for a failed job and go on with the sweep.
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(REQUEUE_STATUS if _is_preempted(agent) else 128 + error.sigval) from None
        except WorkerFailed:
            if _is_preempted(agent):
                raise SystemExit(REQUEUE_STATUS) from None
            raise
        finally:
            if is_restarted:
                tell_accounts(agent.attempt)
    return [results[rank] for rank in sorted(results)]


def _is_preempted(agent: Agent) -> bool:
    return was_preempted(agent.attempt.directory, agent.attempt.number)
