"""Private names of torch's elastic agent and its rendezvous."""

from __future__ import annotations

from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousBackend,
    RendezvousTimeout,
)

from lightning_dist.compat.names import uses

_API = "torch.distributed.elastic.agent.server.api.SimpleElasticAgent"
_AGENT = "torch.distributed.elastic.agent.server.local_elastic_agent.LocalElasticAgent"


class WatchedAgent(LocalElasticAgent):
    """Torch's agent of one machine, which asks what to do when ranks have died, and before it starts them.

    Left to itself it sends SIGTERM to the others and waits 30 s for them, which no argument changes
    (``torch.multiprocessing.ProcessContext.join``): Lightning's handler only takes a note of the signal, and a rank
    that waits in a collective does not get so far.
    """

    @uses(f"{_API}._start_workers", f"{_AGENT}._start_workers")
    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Starts the ranks of this machine; the agents of all machines have met."""
        self.before_start(worker_group)
        return super()._start_workers(worker_group)

    @uses(f"{_API}._monitor_workers", f"{_AGENT}._monitor_workers", f"{_API}._remaining_restarts")
    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Looks whether ranks have died or returned; one that returned lives on until torch has seen all do so."""
        processes = self._processes()
        died = [(rank, process) for rank, process in enumerate(processes) if process.exitcode is not None]
        if not died:
            return super()._monitor_workers(worker_group)
        if not self.after_death(processes):
            self._remaining_restarts = 0
        ranks = self.ranks_here()
        failures = {
            ranks[local_rank]: ProcessFailure(local_rank, process.pid or 0, process.exitcode or 0, error_file="")
            for local_rank, process in died
        }
        return RunResult(state=WorkerState.FAILED, failures=failures)

    @uses(f"{_API}._restart_workers", f"{_AGENT}._restart_workers")
    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        """Ends the ranks that are left, and starts all anew: after a death here, or when machines come or go."""
        self.before_restart(self._processes())
        super()._restart_workers(worker_group)

    @uses(f"{_API}._worker_group")
    def ranks_here(self) -> list[int]:
        """The ranks of this machine in the world, by local rank."""
        return [worker.global_rank for worker in self._worker_group.workers]

    @uses(f"{_AGENT}._pcontext", "torch.distributed.elastic.multiprocessing.api.MultiprocessContext._pc")
    def _processes(self) -> list[BaseProcess]:
        """The ranks of this machine, by local rank."""
        context = self._pcontext and self._pcontext._pc  # type: ignore[attr-defined]
        return list(context.processes) if context else []

    def before_start(self, worker_group: WorkerGroup) -> None:
        """Ranks are about to start."""

    def before_restart(self, processes: list[BaseProcess]) -> None:
        """Ranks are about to be ended, if they have not, and started again."""

    def after_death(self, processes: list[BaseProcess]) -> bool:
        """Some have died, or ended without a result. It ends the others; whether to start all again, if any restart
        is left.
        """
        raise NotImplementedError


_RENDEZVOUS = "torch.distributed.elastic.rendezvous.dynamic_rendezvous.DynamicRendezvousHandler"


class MemberRendezvous(DynamicRendezvousHandler):
    """Torch's rendezvous, which also tells of machines of its round that are gone."""

    _round, _size = -1, 0

    @staticmethod
    def make(
        parameters: RendezvousParameters, store: Any, backend: RendezvousBackend, heartbeat: int, lost_after: int
    ) -> MemberRendezvous:
        """This machine's part of it, over a store.

        Args:
            heartbeat: seconds between two.
            lost_after: how many may be missed before the others forget it.
        """
        seconds = {name: parameters.get_as_int(f"{name}_timeout") for name in ("join", "last_call", "close")}
        timeouts = {name: timedelta(seconds=value) for name, value in seconds.items() if value is not None}
        made = MemberRendezvous.from_backend(
            parameters.run_id,
            store,
            backend,
            parameters.min_nodes,
            parameters.max_nodes,
            parameters.local_addr,
            RendezvousTimeout(**timeouts),
            keep_alive_interval=heartbeat,
            keep_alive_max_attempt=lost_after,
        )
        assert isinstance(made, MemberRendezvous)
        return made

    @uses(f"{_RENDEZVOUS}._state_holder")
    def next_rendezvous(self) -> RendezvousInfo:
        """Meets the others; the state of the round is what is compared with from here on."""
        info = super().next_rendezvous()
        self._round, self._size = self._state_holder.state.round, info.world_size
        return info

    @uses(f"{_RENDEZVOUS}._this_node")
    def num_changes(self) -> int:
        """Machines that wait, or are gone, as the last heartbeat of this one saw it. Asks nobody."""
        state = self._state_holder.state
        if state.round != self._round or self._this_node not in state.participants:
            return 1  # the others have forgotten this one
        return len(state.wait_list) + self._size - len(state.participants)

    @uses(
        f"{_RENDEZVOUS}._settings",
        "torch.distributed.elastic.rendezvous.dynamic_rendezvous.RendezvousTimeout._set_timeouts",
    )
    def shorten_last_call(self, seconds: float) -> None:
        """How long a round that has enough machines waits for more, from here on."""
        self._settings.timeout._set_timeouts(last_call=timedelta(seconds=seconds))

    @uses(f"{_RENDEZVOUS}._keep_alive_timer", "torch.distributed.elastic.rendezvous.utils._PeriodicTimer._ctx")
    def stop_heartbeats(self) -> None:
        """Lets the thread that sends them end when it can, and does not wait for it."""
        if self._keep_alive_timer is not None:
            self._keep_alive_timer._ctx.stop_event.set()
