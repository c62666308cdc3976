"""How the agents of several machines meet, and notice that one is gone.

[Note: a machine that is cut off]
Nothing tells of a network that is down: no connection breaks, and ranks wait in collectives. Torch's agents write a
heartbeat to the rendezvous each second and forget a machine that wrote none for a while, but start their ranks anew
only when their own fail or when a machine waits to join. Here a machine that is gone counts as much as one that waits.
The machine that is cut off sees that the store no longer answers; it ends its ranks before the others begin without
them, so that no two ranks write one checkpoint, and meets the others again as a new machine when it can reach them.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import DEFAULT_PORT, create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from lightning_dist.compat.elastic import MemberRendezvous

log = logging.getLogger(__name__)

T = TypeVar("T")

HEARTBEAT = 1
"""Seconds between two heartbeats of a machine."""
LOST_AFTER = 8
"""Heartbeats that it may miss before the others go on without it."""
CUT_OFF_AFTER = HEARTBEAT * (LOST_AFTER - 2)
"""Seconds since the last heartbeat that the store took, or without an answer of it, after which a machine ends its
ranks: before the others go on."""
LAST_CALL = 2
"""Seconds that machines which meet again wait for more of them."""
_POLL = 0.05
_NO_STORE = (RendezvousError, RuntimeError, OSError)
"""What is raised where a store can't be reached, or answers no more."""


class CutOff(ConnectionError):
    """The store has not answered for too long."""


class AnsweringBackend(RendezvousBackend):
    """A backend that knows since when it waits for an answer of its store, and when the store last took something."""

    def __init__(self, backend: RendezvousBackend) -> None:
        self._backend = backend
        self._asked: dict[int, float] = {}
        self._taken = time.monotonic()
        self.is_left = False
        """Whether nobody wants an answer any more: a thread that gets one late may not join with it."""

    @property
    def name(self) -> str:
        """As torch knows it."""
        return self._backend.name

    def get_state(self) -> Any:
        """As torch's."""
        return self._answered(self._backend.get_state)

    def set_state(self, state: bytes, token: Any = None) -> Any:
        """As torch's."""
        asked = time.monotonic()
        answer = self._answered(self._backend.set_state, state, token)
        if answer is not None and answer[2]:
            self._taken = max(self._taken, asked)
        return answer

    def _answered(self, ask: Callable[..., Any], *args: Any) -> Any:
        self._asked[threading.get_ident()] = time.monotonic()
        answer = None if self.is_left else ask(*args)  # after an error it stays asked: the connection is gone
        if self.is_left:
            raise RendezvousConnectionError("this machine was cut off, and meets the others anew")
        del self._asked[threading.get_ident()]
        return answer

    @property
    def is_cut_off(self) -> bool:
        """Whether the store does not answer."""
        return any(time.monotonic() - asked > CUT_OFF_AFTER for asked in list(self._asked.values()))

    @property
    def is_silent(self) -> bool:
        """Whether the store took nothing for so long that the others are about to forget this machine, while it sends
        heartbeats: it does not answer, or this machine stood still.
        """
        return time.monotonic() - self._taken > CUT_OFF_AFTER


class Machines(RendezvousHandler):
    """Torch's rendezvous over a store at an endpoint, for machines that come and go; see [Note: a machine that is cut
    off].

    Communication: two questions to the store a second.

    Args:
        parameters: of torch's ``c10d`` rendezvous.
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._parameters = parameters
        self._join_timeout = float(parameters.get_as_int("join_timeout", 600) or 600)
        self._member: MemberRendezvous | None = None
        self._backend: AnsweringBackend | None = None
        self._store: dist.Store | None = None
        self._left: list[Any] = []
        """Connections that do not answer, with threads that wait for them: to let go of one would wait too."""
        self.first: int | None = None
        """How many machines the run began with."""

    def get_backend(self) -> str:
        """As torch's."""
        return self._parameters.backend

    @property
    def use_agent_store(self) -> bool:
        """Ranks meet at a store of their own."""
        return False

    def get_run_id(self) -> str:
        """The same for all machines of a run."""
        return self._parameters.run_id

    def next_rendezvous(self) -> RendezvousInfo:
        """Meets the other machines; for as long as the store can't be reached, tries again.

        Raises:
            RendezvousTimeoutError: there were not enough machines, or no store, within ``join_timeout``.
            RendezvousGracefulExitError: the run has ended.
        """
        deadline = time.monotonic() + self._join_timeout
        while True:
            try:
                return self._watched(self._meet)
            except RendezvousClosedError as error:
                raise RendezvousGracefulExitError("the run has ended") from error
            except (RendezvousGracefulExitError, RendezvousTimeoutError):
                raise
            except _NO_STORE as error:
                self._leave()
                if time.monotonic() > deadline:
                    raise RendezvousTimeoutError(f"no store at {self._parameters.endpoint}: {error}") from error
                log.warning("the store at %s does not answer; trying again", self._parameters.endpoint)
                time.sleep(HEARTBEAT)

    def _meet(self) -> RendezvousInfo:
        if self._member is None:
            if self.first is not None:
                self._reach()  # torch tells at length of a store that it does not reach
            backend, self._store = create_backend(self._parameters)
            self._backend = AnsweringBackend(backend)
            self._member = MemberRendezvous.make(self._parameters, self._store, self._backend, HEARTBEAT, LOST_AFTER)
        if self.first is not None:
            self._member.shorten_last_call(LAST_CALL)
        info = self._member.next_rendezvous()
        assert self._store is not None
        known = str(self.first or info.world_size)
        key = f"lightning_dist/{self._parameters.run_id}/machines"
        self.first = int(self._store.compare_set(key, "", known))
        return info

    def _reach(self) -> None:
        host, port = parse_rendezvous_endpoint(self._parameters.endpoint, default_port=DEFAULT_PORT)
        socket.create_connection((host, port), timeout=CUT_OFF_AFTER).close()

    def _watched(self, ask: Callable[[], T]) -> T:
        """The answer of what talks to the store, in a thread that is left behind where none comes."""
        answers: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                answers.append(ask())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="rendezvous", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_POLL)
            if self._backend is not None and self._backend.is_cut_off:
                raise CutOff(f"the store at {self._parameters.endpoint} does not answer")
        if errors:
            raise errors[0]
        return answers[0]

    def _leave(self) -> None:
        if self._backend is not None:
            self._backend.is_left = True
        if self._member is not None:
            self._member.stop_heartbeats()
        self._left.append((self._member, self._backend, self._store))
        self._member = self._backend = self._store = None

    def num_nodes_waiting(self) -> int:
        """Machines that wait to join, or are gone, of which this may be one; asked often, and asks nobody."""
        if self._member is None or self._backend is None:
            return 1
        if self._backend.is_cut_off or self._backend.is_silent:
            log.warning("the store at %s took no heartbeat: this machine is cut off", self._parameters.endpoint)
            self._leave()
            return 1
        return self._member.num_changes()

    def is_closed(self) -> bool:
        """Whether the run has ended."""
        return self._member is not None and self._watched(self._member.is_closed)

    def set_closed(self) -> None:
        """Ends the run, for all machines."""
        if self._member is not None:
            self._watched(self._member.set_closed)

    def shutdown(self) -> bool:
        """The run has ended, for all machines."""
        if self._member is None:
            return False
        try:
            return self._watched(self._member.shutdown)
        except _NO_STORE:
            self._leave()
            return False
