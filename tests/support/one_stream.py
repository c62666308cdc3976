"""The sends and receives of a rank, recorded in one process and played as NCCL runs them: one stream a communicator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.futures import Future
from torch.testing._internal.distributed.fake_pg import FakeStore

Op = tuple[str, int]
"""What a rank does, "send" or "receive", and its peer."""


class _Done(dist._Work):
    def wait(self, *_: Any) -> bool:
        return True

    def get_future(self) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done


class RecordingGroup(dist.ProcessGroup):
    """A process group whose sends and receives are written down; ops of one batch stand together."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.batches: list[list[Op]] = []
        self._open: list[Op] | None = None

    def send(self, _tensors: Any, peer: int, _tag: int) -> Any:
        return self._add("send", peer)

    def recv(self, tensors: Any, peer: int, _tag: int) -> Any:
        tensors[0].fill_(1)  # also what torch's stages vote with, that all know the shapes
        return self._add("receive", peer)

    def _add(self, what: str, peer: int) -> Any:
        if self._open is None:
            self.batches.append([(what, peer)])
        else:
            self._open.append((what, peer))
        return _Done()

    @contextmanager
    def batch(self) -> Iterator[None]:
        self._open = []
        self.batches.append(self._open)
        yield
        self._open = None

    @property
    def group_name(self) -> str:
        return "recording"

    def _get_backend(self, _device: Any) -> Any:
        return self

    def getBackendName(self) -> str:
        return "recording"


def recorded(rank: int, size: int, run: Callable[[RecordingGroup], Any]) -> list[list[Op]]:
    """Batches of sends and receives that ``run(group)`` issues as one rank of several, in order."""
    dist.Backend.register_backend("recording", lambda _store, rank, size, _timeout: RecordingGroup(rank, size))
    dist.init_process_group("recording", store=FakeStore(), rank=rank, world_size=size)
    group = dist.group.WORLD
    assert isinstance(group, RecordingGroup)
    together = dist.batch_isend_irecv

    def batched(ops: list[dist.P2POp]) -> Any:
        with group.batch():
            return together(ops)

    dist.batch_isend_irecv = batched
    try:
        run(group)
    finally:
        dist.batch_isend_irecv = together
        dist.destroy_process_group()
    return group.batches


@dataclass
class _Stream:
    batches: list[list[Op]]
    at: int = 0
    left: Counter[Op] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.go_on()

    def go_on(self) -> bool:
        """To the next batch, if that which ran is through; whether there was one."""
        before = self.at
        while not self.left and self.at < len(self.batches):
            self.left = Counter(self.batches[self.at])
            self.at += 1
        return self.at > before


def stalled(ranks: list[list[list[Op]]]) -> list[int]:
    """The ranks that wait for ever; a send and its receive meet when both are in the batch that runs on their rank."""
    streams = [_Stream(batches) for batches in ranks]
    moved = True
    while moved:
        moved = False
        for rank, stream in enumerate(streams):
            for what, peer in [*stream.left]:
                other = ("receive" if what == "send" else "send", rank)
                if streams[peer].left[other]:
                    stream.left -= Counter([(what, peer)])
                    streams[peer].left -= Counter([other])
                    moved = True
            moved |= stream.go_on()
    return [rank for rank, stream in enumerate(streams) if stream.left]
