"""launch: run a function on several ranks of this machine under torch.distributed's elastic agent.

[Note: why the elastic agent]
Lightning's own launcher replays ``sys.argv`` for every rank but the first. Under Hydra's multirun the second rank
then starts a sweep of its own (Lightning #11300, #15689). The agent instead starts all ranks from a function and its
arguments, watches them, ends the others when one fails, and can start them again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import parent_process
from pathlib import Path
from typing import Any

import torch.distributed
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

log = logging.getLogger(__name__)

MONITOR_INTERVAL = 0.05
"""Seconds between two looks of the agent at its ranks."""

AGENT_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
"""What the agent tells a rank in its environment, beside all that begins with ``TORCHELASTIC_``."""

FOLDED_PACKAGES = ("torch", "lightning", "pytorch_lightning", "hydra")
"""Packages of whose frames a short traceback shows the first and the last of a run only."""


class WorkerFailed(RuntimeError):
    """A rank raised or died, and the others were ended.

    When several ranks failed, this is the first: the others usually only lost their connection to it. Its text is
    the rank and that rank's own traceback, as :func:`short_traceback` writes it.

    Attributes:
        rank: the rank that failed.
        exception: what it raised, or ``None`` if it died without raising or what it raised can't be pickled.
        traceback: its whole traceback as text; empty if it died without raising.
    """

    def __init__(
        self,
        rank: int,
        summary: str,
        short_traceback: str = "",
        traceback: str = "",
        exception: Exception | None = None,
    ) -> None:
        super().__init__(f"rank {rank} {summary}" + (f"\n\n{short_traceback}" if short_traceback else ""))
        self.rank = rank
        self.traceback = traceback
        self.exception = exception


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
        stack.enter_context(_environment(num_processes))
        stack.enter_context(_quiet_agent())
        stack.enter_context(_signal_handlers_restored())
        stack.enter_context(_no_process_left())
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
            raise _first_failure(Path(directory), max_restarts, error) from None
        except SignalException as error:
            # It is an Exception: Hydra, for one, would take it for a failed job and go on with the sweep.
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
    return [results[rank] for rank in range(num_processes)]


def short_traceback(error: BaseException, *, skip: int = 0) -> str:
    """The traceback of ``error`` as text, without what the user can't act on.

    Args:
        error: an exception that was caught.
        skip: the number of outermost frames to leave out.
    """
    frames = traceback.extract_tb(error.__traceback__)[skip:]
    lines = ["Traceback (most recent call last):\n"]
    for package, run in itertools.groupby(frames, key=_folded_package):
        of_run = list(run)
        if package is None or len(of_run) <= 3:
            lines += traceback.format_list(of_run)
        else:
            lines += traceback.format_list(of_run[:1])
            lines.append(f"  ... {len(of_run) - 2} frames of {package} ...\n")
            lines += traceback.format_list(of_run[-1:])
    lines += traceback.format_exception_only(error)
    return "".join(lines).rstrip()


def _folded_package(frame: traceback.FrameSummary) -> str | None:
    _, found, path = frame.filename.partition(f"{os.sep}site-packages{os.sep}")
    package = path.split(os.sep)[0]
    return "libraries" if found and package in FOLDED_PACKAGES else None


@dataclass(frozen=True)
class _Failure:
    """What a failing rank leaves for the launching process, in a file of the launch's directory."""

    rank: int
    attempt: int
    time: float
    summary: str
    short_traceback: str
    traceback: str

    @staticmethod
    def record(directory: Path, rank: int, attempt: int, error: Exception) -> None:
        failure = {
            "rank": rank,
            "attempt": attempt,
            "time": time.time(),
            "summary": f"failed: {type(error).__name__}: {_first_line(error)}",
            "short_traceback": short_traceback(error, skip=1),  # without the frame of _run_rank
            "traceback": "".join(traceback.format_exception(error)),
        }
        # An exception that doesn't pickle is still told by its traceback.
        with contextlib.suppress(Exception):
            (directory / f"exception-{attempt}-{rank}.pickle").write_bytes(pickle.dumps(error))
        (directory / f"failure-{attempt}-{rank}.json").write_text(json.dumps(failure))

    @staticmethod
    def first(directory: Path, attempt: int) -> _Failure | None:
        """The first failure of an attempt, or ``None`` if no rank left one."""
        files = directory.glob(f"failure-{attempt}-*.json")
        return min((_Failure(**json.loads(file.read_text())) for file in files), key=_Failure.when, default=None)

    def when(self) -> float:
        return self.time

    def exception(self, directory: Path) -> Exception | None:
        try:
            return pickle.loads((directory / f"exception-{self.attempt}-{self.rank}.pickle").read_bytes())
        except Exception:
            return None


def _run_rank(call: tuple[Callable[..., Any], tuple[Any, ...], str, dict[str, str]]) -> Any:
    worker, args, directory, environment = call
    _end_with_launching_process()
    _leave_fork_server(environment)
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt and rank == 0:
        reason = _Failure.first(Path(directory), attempt - 1)
        told = f"rank {reason.rank} {reason.summary}" if reason else "a rank died without an exception"
        log.warning("starting all ranks again (restart %d): %s", attempt, told)
    try:
        result = worker(*args)
    except Exception as error:
        _Failure.record(Path(directory), rank, attempt, error)
        raise
    leave_process_group()
    return result


def leave_process_group() -> None:
    """Ends this rank's process group, if it is in one, while nothing else ends: a rank that leaves that to the end of
    Python may abort there ("terminate called without an active exception", seen in torch 2.14 under torchrun).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _leave_fork_server(environment: dict[str, str]) -> None:
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


def _end_with_launching_process() -> None:
    """Ends this rank when the launching process is gone, even by SIGKILL: a fork server would outlive it."""
    launching = parent_process()
    if launching is None:
        return

    def wait() -> None:
        launching.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="end with launching process", daemon=True).start()


def _first_failure(directory: Path, attempt: int, error: ChildFailedError) -> WorkerFailed:
    """The rank that failed first; the agent itself only knows which failed rank it saw first."""
    seen_rank, seen = error.get_first_failure()
    told = _Failure.first(directory, attempt)
    # A rank that was killed can't tell: others then tell that they lost it. An abort is the reverse, a
    # communication library that lost another rank.
    was_killed = seen.exitcode < 0 and seen.exitcode != -signal.SIGABRT
    if told is None or (was_killed and told.rank != seen_rank):
        return WorkerFailed(seen_rank, _cause_of_death(seen))
    return WorkerFailed(told.rank, told.summary, told.short_traceback, told.traceback, told.exception(directory))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _cause_of_death(failure: ProcessFailure) -> str:
    if failure.exitcode == -signal.SIGKILL:
        return "was killed (SIGKILL); the usual reason is that the machine ran out of memory"
    if failure.exitcode < 0:
        return f"was ended by {signal.Signals(-failure.exitcode).name}"
    return f"ended with exit code {failure.exitcode}, without an exception"


@contextlib.contextmanager
def _environment(num_processes: int) -> Iterator[None]:
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
def _quiet_agent() -> Iterator[None]:
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
def _signal_handlers_restored() -> Iterator[None]:
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
def _no_process_left() -> Iterator[None]:
    """Kills what the agent leaves running, for instance when a signal comes while it starts the ranks."""
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
            process.join()
