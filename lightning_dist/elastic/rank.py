"""What a rank does around the function that it was started for."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import parent_process
from typing import Any

import torch
import torch.distributed

from lightning_dist.elastic.agent import Call
from lightning_dist.elastic.attempt import Attempt
from lightning_dist.elastic.failures import Failure, record_preempted
from lightning_dist.elastic.processes import birth, kill_all
from lightning_dist.elastic.signals import REQUEUE_STATUS

log = logging.getLogger(__name__)

AGENT_LIVES = "agent"
"""A file of the run's directory, which the first rank that misses the agent renames: it clears up."""

_AGENT_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
"""What the agent tells a rank in its environment, beside all that begins with ``TORCHELASTIC_``."""


def run_rank(call: Call) -> Any:
    """Calls the function of a launch on this rank; what that raises is left for the launching process too.

    It records ``up``, with the process.
    """
    attempt = call.attempt
    end_with_launching_process(partial(clear_up, attempt))
    leave_fork_server(call.environment)
    Failure.launch = attempt
    attempt.record("up", pid=os.getpid(), birth=birth(os.getpid()))
    rank = int(os.environ["RANK"])
    if call.is_restarted:
        os.environ.update(attempt.variables())
    if attempt.number and rank == 0:
        ends = [event for event in attempt.events() if event["event"] == "ended"]
        log.warning("starting all ranks again (restart %d): %s", attempt.number, ends[-1]["why"] if ends else "")
    try:
        result = call.worker(*call.args)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code == REQUEUE_STATUS:
            record_preempted(attempt.directory, attempt.number, rank)
            leave_process_group()
            raise  # one that returned would wait for the agent to take its result, which ends it
        Failure.record(attempt.directory, rank, attempt.number, error)
        raise
    leave_process_group()
    return result


def leave_process_group() -> None:
    """Ends this rank's process group, if it is in one, while nothing else ends: a rank that leaves that to the end of
    Python may abort there ("terminate called without an active exception", seen in torch 2.14 under torchrun).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave_fork_server(environment: dict[str, str]) -> None:
    """Gives a rank what a spawned one has of the launching process, in place of what the fork server had."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores Ctrl-C, and so would its children
    of_agent = {name for name in environment if name in _AGENT_VARIABLES or name.startswith("TORCHELASTIC_")}
    os.environ.update({name: value for name, value in environment.items() if name not in of_agent})
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # was read when torch was imported
    if "numpy" in sys.modules:
        # Python reseeds its own generator after a fork, NumPy does not: without a seed all jobs would draw the same.
        sys.modules["numpy"].random.seed()


def end_with_launching_process(before: Callable[[], None] | None = None) -> None:
    """Ends this rank when the launching process is gone, even by SIGKILL: a fork server would outlive it.

    ``before`` is called before, in a thread.
    """
    launching = parent_process()
    if launching is None:
        return

    def wait() -> None:
        launching.join()
        try:
            if before is not None:
                before()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="end with launching process", daemon=True).start()


def clear_up(attempt: Attempt) -> None:
    """In place of the launching process, which was killed: one rank has a process of its own end all ranks, also those
    that are stopped, and remove the run's directory, when nobody writes to it any more.
    """
    try:
        (attempt.directory / AGENT_LIVES).rename(attempt.directory / "cleared")
    except OSError:
        time.sleep(1)  # another rank does so
        return
    if os.fork():
        time.sleep(1)
        return
    try:
        ups = {e["pid"]: e["birth"] for e in attempt.events() if e["event"] == "up" and e["birth"] is not None}
        left = [pid for pid, born in ups.items() if birth(pid) == born]
        kill_all(left, spare=os.getpid())
        deadline = time.monotonic() + 5
        while any(birth(pid) == ups[pid] for pid in left) and time.monotonic() < deadline:
            time.sleep(0.01)
        shutil.rmtree(attempt.directory, ignore_errors=True)
    finally:
        os._exit(0)
