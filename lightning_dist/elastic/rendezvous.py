"""Where the agents of a run's machines meet."""

from __future__ import annotations

import contextlib
import socket
import uuid
from dataclasses import dataclass, field
from typing import Any

from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from lightning_dist.elastic.machines import Machines


@dataclass(frozen=True)
class Rendezvous:
    """Which machines form a run; by default this one alone.

    Args:
        min_nodes, max_nodes: with how many the run goes on, and how many may join.
        endpoint: ``host:port`` of the store by which they meet: of one of them, which hosts it, or of another machine.
            None: this machine, at a free port.
        run_id: the same for all machines of a run.
        settings: of torch's ``c10d`` rendezvous, such as ``{"last_call_timeout": 5}``.
    """

    min_nodes: int = 1
    max_nodes: int = 1
    endpoint: str | None = None
    run_id: str = field(default_factory=lambda: f"launch-{uuid.uuid4().hex}")
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.min_nodes <= self.max_nodes:
            raise ValueError(f"nnodes={self.min_nodes}:{self.max_nodes} is no range; pass MIN:MAX, such as 1:2")
        if self.max_nodes > 1 and self.endpoint is None:
            raise ValueError("several nodes need an endpoint where they meet: host:port of one of them")

    @staticmethod
    def parse(nnodes: str, endpoint: str | None = None, run_id: str | None = None) -> Rendezvous:
        """As a command has it: ``"2"`` or ``"1:2"``. A ValueError for what is no number or range."""
        least, _, most = str(nnodes).partition(":")
        if not (least.isdigit() and (most or least).isdigit()):
            raise ValueError(f"nnodes={nnodes!r} is neither a number nor MIN:MAX")
        named: dict[str, Any] = {} if endpoint is None else {"run_id": run_id or "lightning_dist"}
        return Rendezvous(int(least), int(most or least), endpoint, **named)

    @property
    def is_alone(self) -> bool:
        """Whether this machine's agent meets no other."""
        return self.endpoint is None

    @property
    def local_addr(self) -> str | None:
        """By which other machines reach this one. Without it the agent looks up this machine's full name, which
        containers often can't resolve.
        """
        return "localhost" if self.endpoint is None else _address_towards(self.endpoint)

    def handler(self) -> RendezvousHandler:
        """What the agent asks: torch's own, or for several machines :class:`Machines`."""
        parameters = RendezvousParameters(
            backend="c10d",
            endpoint=self.endpoint or "localhost:0",
            run_id=self.run_id,
            min_nodes=self.min_nodes,
            max_nodes=self.max_nodes,
            local_addr=self.local_addr,
            **self.settings,
        )
        return get_rendezvous_handler(parameters) if self.is_alone else Machines(parameters)


def _address_towards(endpoint: str) -> str | None:
    """This machine's address in the network of another one. Sends nothing."""
    host, _, port = endpoint.rpartition(":")
    with contextlib.suppress(OSError, ValueError):
        family, kind, _, _, address = socket.getaddrinfo(host or endpoint, port or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    return None
