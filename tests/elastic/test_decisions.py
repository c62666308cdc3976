"""What an agent and a restarted rank decide, without ranks: whether to start again, from which state, what it cost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from lightning_dist.elastic import Rendezvous, fork_server
from lightning_dist.elastic.attempt import Attempt, Place
from lightning_dist.elastic.downtime import Downtime
from lightning_dist.elastic.failures import Failure
from lightning_dist.elastic.processes import birth, descendants, kill_all
from lightning_dist.elastic.restarts import Restarts
from lightning_dist.elastic.states import newest_states, record_state, saved_states


def failure(error: Exception, directory: Path) -> Failure:
    Failure.record(directory, 0, 0, error)
    told = Failure.first(directory, 0)
    assert told is not None
    return told


def at(step: int) -> Place:
    return Place(fit=0, step=step, attempt=0, time=float(step))


def test_an_exception_is_tried_again_once_at_a_place_and_never_before_a_step(tmp_path: Path) -> None:
    told, restarts = failure(ValueError("wrong"), tmp_path), Restarts()
    assert not restarts.are_of_use(1, told, None)
    assert restarts.are_of_use(1, told, at(3))
    assert restarts.are_of_use(1, told, at(4))
    assert not restarts.are_of_use(1, told, at(4)._replace(attempt=7, time=9.0))
    assert restarts.are_of_use(3, None, at(4))
    assert not restarts.are_of_use(3, None, at(4))
    assert not restarts.are_of_use(3, None, None)


@pytest.mark.parametrize(
    "error", [RuntimeError("... Connection closed by peer [127.0.0.1]"), dist.DistNetworkError("no route")]
)
def test_who_was_killed_or_lost_another_is_always_started_again(error: Exception, tmp_path: Path) -> None:
    restarts = Restarts()
    for _ in range(3):
        assert restarts.are_of_use(1, failure(error, tmp_path), None)
        assert restarts.are_of_use(-signal.SIGKILL, None, None)
        assert restarts.are_of_use(-signal.SIGABRT, None, None)


def test_an_exception_of_its_own_is_told_before_that_of_a_lost_peer(tmp_path: Path) -> None:
    Failure.record(tmp_path, 0, 0, RuntimeError("Connection closed by peer"))
    Failure.record(tmp_path, 1, 0, ValueError("the reason"))
    told = Failure.first(tmp_path, 0)
    assert told is not None
    assert told.rank == 1


def test_the_newest_state_of_a_fit_that_is_still_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = Attempt(tmp_path, 0)
    for rank, (fit, path, step) in enumerate([(0, "a", 4), (1, "b", 2), (0, "c", 8), (0, "a", 12), (0, "d", 16)]):
        monkeypatch.setenv("RANK", str(rank % 2))
        record_state(attempt, fit, path, step, step, time.time())
    states = saved_states(attempt, 0)
    assert [(state.path, state.step) for state in states] == [("d", 16), ("a", 12), ("c", 8)]
    assert [state.path for state in newest_states(states + states, lambda path: path != "d")] == ["a", "c"]


def test_progress_is_that_of_the_attempt(tmp_path: Path) -> None:
    before, now = Attempt(tmp_path, 0), Attempt(tmp_path, 1)
    descriptor = before.open_progress()
    try:
        assert before.progress() is None
        before.note_progress(descriptor, 0, 7)
        reached = before.progress()
        assert reached is not None
        assert reached.step == 7
        assert now.progress() is None
        now.note_progress(descriptor, 0, 5)
        reached = now.progress()
        assert reached is not None
        assert reached.step == 5
    finally:
        os.close(descriptor)


def test_what_a_restart_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, now = Attempt(tmp_path, 0), Attempt(tmp_path, 1)
    clock = iter([11.0, 12.0, 14.0, 17.0, 21.0])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    before.record("ended", why="", fit=0, step=9, last=10.0)
    for event in ("up", "formed", "loaded", "first_step"):
        now.record(event)
    cost = Downtime.of(now, 0, 5)
    assert cost is not None
    assert cost.lost == 4
    assert list(cost.parts.values()) == [1.0, 1.0, 2.0, 3.0, 4.0]
    assert "4 steps are lost" in str(cost)
    assert "11.0 s" in str(cost)
    assert Downtime.of(before, 0, 0) is None


@pytest.mark.parametrize(
    ("nnodes", "endpoint"), [("2", None), ("3:2", "host:1"), ("0", None), ("a:b", "host:1"), ("", "host:1")]
)
def test_machines_that_can_not_be_are_refused(nnodes: str, endpoint: str | None) -> None:
    with pytest.raises(ValueError, match=r"nnodes=|nodes need"):
        Rendezvous.parse(nnodes, endpoint)


def test_modules_of_a_script_are_found_without_running_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch.nn as nn, os\nfrom lightning.pytorch import Trainer\nfrom . import x\nraise OSError\n"
    )
    assert fork_server.imported_by(script) == ["torch.nn", "os", "lightning.pytorch"]
    script.write_text("import (")
    assert fork_server.imported_by(script) == []


def test_a_process_is_killed_with_what_it_started() -> None:
    program = "import subprocess, time; subprocess.Popen(['sleep', '60']); print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (child,) = descendants(process.pid)
        born = birth(child)
        assert born is not None
        kill_all([process.pid])
    deadline = time.monotonic() + 10
    while birth(child) == born:
        assert time.monotonic() < deadline
        time.sleep(0.01)
