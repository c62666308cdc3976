"""Jobs of a sweep side by side: each in a process of its own, as many at once as there are slots.

[Note: processes of slots]
The process of a job is forked from the server that holds the imports (see ``lightning_dist.elastic.fork_server``), as
the ranks that it starts are, so no job imports anew. It and its ranks are in process groups of their own: Ctrl-C
reaches the sweep alone, which ends its jobs by SIGTERM, so that their fits save first. When the sweep is killed, its
jobs notice.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from recipes import fork_server
from recipes.config_errors import ConfigError
from recipes.overrides import task_overrides
from recipes.sweep.job_process import Call, run, start_method
from recipes.sweep.machine import Machine
from recipes.sweep.result import NOT_ENDED, JobResult

log = logging.getLogger("recipes.train")

SHUTDOWN = 60.0
"""Seconds that jobs have to end after a signal, before they are killed."""


@dataclass
class SlotJob:
    """A job that is to run.

    Args:
        number: of the job in its sweep.
        config: composed, with Hydra's own.
        directory: that it writes to.
        overrides: what makes it differ from others, to be shown.
        task: the function of the job, as ``(module, name)``.
    """

    number: int
    config: DictConfig
    directory: Path
    overrides: list[str]
    task: tuple[str, str]
    began: float = 0.0
    taken: list[str] = field(default_factory=list)


class Slots:
    """Runs jobs side by side.

    Args:
        machine: what they share.
        allowed: what configs may name, see [Note: targets].
    """

    def __init__(self, machine: Machine, allowed: tuple[str, ...]) -> None:
        self._machine, self._allowed = machine, allowed
        self._running: dict[BaseProcess, SlotJob] = {}

    def run(self, jobs: Iterable[SlotJob], ended: Callable[[SlotJob], None], look_ahead: bool = True) -> None:
        """Runs all jobs to their end. No slot is idle while a job waits that fits into it; one that needs more than is
        free lets others go first.

        Args:
            jobs: asked for when there is a slot for the next one.
            ended: is told of each job when it has ended, or failed because it can't start.
            look_ahead: whether to ask for more jobs while one waits; not where the next hangs on results of others.

        Raises:
            KeyboardInterrupt, SystemExit: a signal ended this process; all jobs have ended by then.
        """
        source, waiting = iter(jobs), list[SlotJob]()
        with _signals_unwind(), self._ends_all():
            while True:
                self._start_all(source, waiting, ended, look_ahead)
                if not self._running:
                    return
                connection.wait([process.sentinel for process in self._running])
                for process in [process for process in self._running if not process.is_alive()]:
                    job = self._end(process)
                    ended(job)

    def _start_all(
        self, source: Iterator[SlotJob], waiting: list[SlotJob], ended: Callable[[SlotJob], None], look_ahead: bool
    ) -> None:
        """Starts what fits: of those that wait, then of what comes next. What can't start has ended."""
        for job in list(waiting):
            if self._start(job, ended):
                waiting.remove(job)
        while (look_ahead or not waiting) and self._machine.has_slot:
            following = next(source, None)
            if following is None:
                return
            if not self._start(following, ended):
                waiting.append(following)
        if look_ahead and not waiting and (following := next(source, None)) is not None:
            waiting.append(following)  # composed while others run, not when a slot is free

    def _start(self, job: SlotJob, ended: Callable[[SlotJob], None]) -> bool:
        """Whether it no longer waits."""
        try:
            needed = self._machine.needs(job.config)
            num_ranks = needed or _num_ranks(job.config)
        except (ConfigError, ValueError, OmegaConfBaseException) as error:
            log.error("#%d failed: %s", job.number, error)
            JobResult(task_overrides(job.config.hydra), str(error).splitlines()[0], {}).save(job.directory)
            ended(job)
            return True
        taken = self._machine.take(needed)
        if taken is None:
            return False
        job.taken, job.began = taken, time.monotonic()
        environment = dict(os.environ) | self._machine.environment(taken, num_ranks)
        method = start_method(job.config)
        server: dict[str, Any] = {}
        if method == "forkserver":
            fork_server.start(job.config)
            server = fork_server.address()
        call = Call(job.config, job.task, self._allowed, environment, str(job.directory / "console.log"), server)
        context: Any = multiprocessing.get_context(method)
        process = context.Process(target=run, args=(call,), name=f"job {job.number}")
        log.info("#%d starts%s: %s", job.number, _on(self._machine, taken), " ".join(job.overrides))
        process.start()
        self._running[process] = job
        return True

    def _end(self, process: BaseProcess) -> SlotJob:
        job = self._running.pop(process)
        process.join()
        self._machine.give_back(job.taken)
        result = _settle(job, process.exitcode or 0)
        log.info("#%d ends after %.1f s%s", job.number, time.monotonic() - job.began, f": {result}" if result else "")
        return job

    @contextlib.contextmanager
    def _ends_all(self) -> Iterator[None]:
        """Whatever happens here, no job outlives it."""
        try:
            yield
        finally:
            for process in self._running:
                process.terminate()
            deadline = time.monotonic() + SHUTDOWN
            try:
                for process in self._running:
                    process.join(max(0.0, deadline - time.monotonic()))
            finally:
                for process in self._running:
                    process.kill()  # its ranks notice
                    process.join()
                self._running.clear()


def _settle(job: SlotJob, exit_code: int) -> str | None:
    """The error of a job that has ended; one whose process was killed could not leave it itself."""
    result = JobResult.of(job.directory)
    if exit_code and (result is None or result.error == NOT_ENDED):
        died = f"was killed ({signal.Signals(-exit_code).name})" if exit_code < 0 else f"ended with status {exit_code}"
        result = JobResult(task_overrides(job.config.hydra), f"the process of the job {died}", {})
        result.save(job.directory)
    return result.error if result and result.error != NOT_ENDED else None


def _num_ranks(cfg: DictConfig) -> int:
    from recipes.train import count_devices  # which imports this package

    return count_devices(cfg.trainer.devices, "cpu")


def _on(machine: Machine, taken: list[str]) -> str:
    return f" on {machine.variable}={','.join(taken)}" if machine.devices and taken else ""


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """Signals that end this process unwind it first."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
