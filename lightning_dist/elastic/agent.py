"""Torch's elastic agent, with ranks that end at once when one of them has died, and a record of what happened."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from typing import Any

from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException

from lightning_dist.compat.elastic import WatchedAgent
from lightning_dist.elastic.attempt import Attempt
from lightning_dist.elastic.failures import Failure, first_failure, was_killed, was_preempted
from lightning_dist.elastic.guard import GRACE
from lightning_dist.elastic.machines import Machines
from lightning_dist.elastic.processes import kill_all
from lightning_dist.elastic.rendezvous import Rendezvous
from lightning_dist.elastic.restarts import Restarts

_POLL = 0.05


@dataclass(frozen=True)
class Call:
    """What every rank of an attempt is handed.

    Attributes:
        worker, args: the function that it calls, and with what.
        attempt: which one this is, and where what outlives it lies.
        is_restarted: whether the ranks would be started again.
        environment: of the launching process.
    """

    worker: Callable[..., Any]
    args: tuple[Any, ...]
    attempt: Attempt
    is_restarted: bool
    environment: dict[str, str]


class Agent(WatchedAgent):
    """Starts the ranks of this machine, watches them, and starts all anew after a failure, as long as restarts are left
    and of use; see :class:`Restarts`.

    It records ``start`` (of an attempt, with its number of ranks), ``failed`` (which rank, with its exit code) and
    ``ended`` (all have, and why; how far they came: fit and step, and when).

    Args:
        entrypoint: called on every rank with the :class:`Call` of its attempt.
        call: of the first attempt.
        num_processes: the ranks of this machine.
        max_restarts: after failures of ranks of this machine. That machines come or go is not counted.
        rendezvous: where it meets the agents of other machines.
        start_method, shutdown_timeout: as of :func:`~lightning_dist.elastic.launch`.
    """

    def __init__(
        self,
        entrypoint: Callable[[Call], Any],
        call: Call,
        *,
        num_processes: int,
        max_restarts: int,
        rendezvous: Rendezvous,
        start_method: str,
        shutdown_timeout: int,
    ) -> None:
        spec = WorkerSpec(
            role="default",
            local_world_size=num_processes,
            entrypoint=entrypoint,
            args=(call,),
            rdzv_handler=rendezvous.handler(),
            max_restarts=max_restarts,
            monitor_interval=_POLL,
            local_addr=rendezvous.local_addr,
        )
        logs = DefaultLogsSpecs(log_dir=str(call.attempt.directory / "logs"))
        super().__init__(spec, logs, start_method, shutdown_timeout=shutdown_timeout)
        self._spec, self._call, self._next = spec, call, call.attempt
        self._restarts = Restarts()
        self._died: tuple[int, int] | None = None

    def run_to_end(self) -> dict[int, Any]:
        """What ``worker`` returned, by rank, of this machine's ranks.

        Raises:
            WorkerFailed: a rank failed, and no restart was left or of use.
            SignalException: this process got a signal that ends it.
        """
        shuts_down = True
        try:
            result: RunResult | None = self.run()
        except SignalException:
            shuts_down = False  # machines that come later would find the rendezvous closed
            raise
        finally:
            if shuts_down:
                self._spec.rdzv_handler.shutdown()
        if result is None:
            raise RuntimeError(
                "the rendezvous was closed by another machine of the run before this one could join; start the run "
                "anew on all of them"
            )
        if not result.is_failed():
            return result.return_values
        ended = {rank: failure.exitcode for rank, failure in result.failures.items()}  # when all had returned
        died = self._died or next(iter(ended.items()))
        raise first_failure(self.attempt.directory, self.attempt.number, *died)

    @property
    def attempt(self) -> Attempt:
        """That runs."""
        return self._call.attempt

    def before_start(self, worker_group: WorkerGroup) -> None:
        """An attempt begins: its ranks are told of it."""
        machines = self._spec.rdzv_handler
        first = machines.first if isinstance(machines, Machines) else None
        first_ranks = None if first is None else first * len(worker_group.workers)
        self._call = replace(self._call, attempt=replace(self._next, first_ranks=first_ranks))
        self._next = Attempt(self.attempt.directory, self.attempt.number + 1)
        self._spec.args = (self._call,)
        self._died = None
        self.attempt.record("start", world_size=worker_group.workers[0].world_size, ranks=self.ranks_here())

    def before_restart(self, processes: list[BaseProcess]) -> None:
        """Machines have come or gone, or ranks of this one have died, in which case all have ended by now."""
        if any(process.is_alive() for process in processes):
            self._end(processes, why="machines of the run came or went")

    def after_death(self, processes: list[BaseProcess]) -> bool:
        """Ends the ranks that are left: at once where one was killed, else when they had time to tell what they met,
        which may be what began it.
        """
        found = ((rank, process.exitcode) for rank, process in enumerate(processes))
        codes = {rank: code for rank, code in found if code is not None}
        local_rank, code = min(codes.items(), key=lambda died: not was_killed(died[1]))
        rank = self.ranks_here()[local_rank]
        self._died = rank, code
        self.attempt.record("failed", rank=rank, exit_code=code)
        deadline = time.monotonic() + (0 if was_killed(code) else GRACE)
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            time.sleep(_POLL)
        directory, number = self.attempt.directory, self.attempt.number
        self._end(processes, why=str(first_failure(directory, number, rank, code)).partition("\n")[0])
        if was_preempted(directory, number):
            return False
        return self._restarts.are_of_use(code, Failure.first(directory, number), self.attempt.progress())

    def _end(self, processes: list[BaseProcess], why: str) -> None:
        kill_all([process.pid for process in processes if process.is_alive() and process.pid])
        for process in processes:
            process.join()
        reached = self.attempt.progress()
        place = {} if reached is None else {"fit": reached.fit, "step": reached.step, "last": reached.time}
        self.attempt.record("ended", why=why, **place)
