"""Agents of several machines at one store: who is gone, and who is cut off."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousGracefulExitError

from lightning_dist.elastic import machines
from lightning_dist.elastic.machines import Machines


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a store that lives as long as the test."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    yield f"localhost:{store.port}"
    del store


def _machine(endpoint: str) -> Machines:
    settings = {"last_call_timeout": 1, "is_host": False}
    return Machines(RendezvousParameters("c10d", endpoint, "run", 1, 2, local_addr="localhost", **settings))


def _meet(*each: Machines) -> set[int]:
    """With how many machines the run goes on, as each of them hears."""
    with ThreadPoolExecutor(len(each)) as threads:
        return {info.world_size for info in threads.map(lambda machine: machine.next_rendezvous(), each)}


def _within(seconds: float, condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def test_a_machine_that_is_cut_off_is_missed_and_meets_the_others_again(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "CUT_OFF_AFTER", 4)  # far from the other, for a machine that is busy with other tests
    monkeypatch.setattr(machines, "LOST_AFTER", 9)
    stays, goes = _machine(endpoint), _machine(endpoint)
    assert _meet(stays, goes) == {2}
    assert stays.num_nodes_waiting() == goes.num_nodes_waiting() == 0
    silence, backend = threading.Event(), goes._backend
    assert backend is not None
    real, backend._backend = backend._backend, _Silent(silence)  # type: ignore[assignment]
    assert _within(30, goes.num_nodes_waiting)
    assert not stays.num_nodes_waiting(), "the ranks of the one that is cut off have to end first"
    assert _within(30, stays.num_nodes_waiting)
    assert _meet(stays) == {1}
    backend._backend = real
    silence.set()  # an answer that comes late: nobody joins with it
    with ThreadPoolExecutor(1) as thread:
        back = thread.submit(goes.next_rendezvous)
        assert _within(30, stays.num_nodes_waiting)
        assert _meet(stays) == {2}
        assert back.result(10).world_size == 2
    assert stays.first == goes.first == 2
    assert stays.shutdown()
    with pytest.raises(RendezvousGracefulExitError, match="the run has ended"):
        goes.next_rendezvous()


def test_ranks_of_a_machine_that_is_cut_off_end_before_the_others_go_on() -> None:
    questions_apart = 2 * machines.HEARTBEAT  # torch keeps what it read for a second
    assert 2 * questions_apart <= machines.CUT_OFF_AFTER
    assert machines.CUT_OFF_AFTER + 2 <= machines.HEARTBEAT * machines.LOST_AFTER


def test_a_machine_that_stood_still_knows_that_the_others_went_on(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, now = _machine(endpoint), time.monotonic
    assert _meet(machine) == {1}
    assert not machine.num_nodes_waiting()
    monkeypatch.setattr(time, "monotonic", lambda: now() + machines.CUT_OFF_AFTER + 1)  # and no heartbeat meanwhile
    assert machine.num_nodes_waiting()


@pytest.mark.parametrize("is_taken", [True, False])
def test_an_answer_that_takes_no_heartbeat_is_silence(is_taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        name = "store"

        def get_state(self) -> tuple[bytes, int]:
            return b"", 0

        def set_state(self, state: bytes, token: object = None) -> tuple[bytes, int, bool]:
            return state, 0, is_taken

    clock = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    backend = machines.AnsweringBackend(Store())  # type: ignore[arg-type]
    for _ in range(machines.CUT_OFF_AFTER + 1):
        clock += 1
        backend.get_state()
        backend.set_state(b"")
    assert not backend.is_cut_off
    assert backend.is_silent == (not is_taken)


class _Silent:
    """Answers when it is told to."""

    name = "silent"

    def __init__(self, told: threading.Event) -> None:
        self.told = told

    def get_state(self) -> None:
        self.told.wait(60)

    def set_state(self, *_: object) -> None:
        self.told.wait(60)
