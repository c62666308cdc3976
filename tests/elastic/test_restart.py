"""A run whose ranks fail goes on by itself, with the samples, losses and weights of one that nobody disturbed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.elastic import runs
from tests.elastic.kills import kill_many
from tests.faults.strikes import noted_ranks, processes_of, wait_until_gone

KILLS = [
    (0, {"kind": "kill", "rank": 1, "when": "collective", "step": 6, "attempt": 0}),
    (0, {"kind": "kill", "rank": 0, "when": "save", "step": 8, "attempt": 1}),
]


def test_killed_in_a_collective_and_in_a_save_a_run_goes_on_as_if_never_disturbed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"layout": "dp_shard=2", "ranks": 2, "steps": [18], "every": 4}
    ended, text = runs.run(tmp_path / "reference", max_restarts=0, **options)
    assert ended, text
    process = runs.start(tmp_path / "killed", max_restarts=3, faults=KILLS, **options)
    text = runs.end(process, tmp_path / "killed")
    assert process.returncode == 0, text
    runs.assert_equal(tmp_path / "killed", tmp_path / "reference", 2)
    first, second = runs.lost_steps(tmp_path / "killed", 2)
    assert first in (2, 3)  # rank 0 may have had all that it needed of rank 1 for the step
    assert second == 4
    assert text.count("Gone on from step 4 of fit 0") == 2
    assert f"{first} steps are lost" in text
    assert "starting all ranks again (restart 2): rank 0 was killed (SIGKILL)" in text


@pytest.mark.slow
def test_killed_after_an_epochs_end_and_again_within_the_next_it_goes_on(tmp_path: Path) -> None:
    """From snapshots; the first epoch has seven steps."""
    options: dict[str, Any] = {"layout": "dp_shard=2", "ranks": 2, "steps": [16], "every": 4, "snapshots": 1}
    faults = [
        (0, {"kind": "kill", "rank": 0, "when": "batch", "step": 7, "attempt": 0}),
        (0, {"kind": "kill", "rank": 1, "when": "collective", "step": 8, "attempt": 1}),
    ]
    assert runs.run(tmp_path / "reference", max_restarts=0, **options)[0]
    ended, text = runs.run(tmp_path / "killed", faults=faults, **options)
    assert ended, text
    runs.assert_equal(tmp_path / "killed", tmp_path / "reference", 2)
    assert max(runs.lost_steps(tmp_path / "killed", 2)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("async_save", [False, True])
def test_each_of_several_fits_goes_on_from_its_own_state(async_save: bool, tmp_path: Path) -> None:
    """The first has ended, and is gone through from its last checkpoint, two steps before its end."""
    options: dict[str, Any] = {"layout": "dp_replicate=2", "ranks": 2, "steps": [10, 9], "every": 4}
    options["async_save"] = async_save
    faults = [(1, {"kind": "kill", "rank": 1, "when": "collective", "step": 7, "attempt": 0})]
    assert runs.run(tmp_path / "reference", max_restarts=0, **options)[0]
    ended, text = runs.run(tmp_path / "killed", faults=faults, **options)
    assert ended, text
    runs.assert_equal(tmp_path / "killed", tmp_path / "reference", 2)
    assert "Gone on from step 8 of fit 0" in text


@pytest.mark.slow
def test_without_checkpoints_a_fit_begins_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"layout": "dp_replicate=2", "ranks": 2, "steps": [6], "every": 0}
    faults = [(0, {"kind": "kill", "rank": 0, "when": "batch", "step": 4, "attempt": 0})]
    assert runs.run(tmp_path / "reference", max_restarts=0, **options)[0]
    ended, text = runs.run(tmp_path / "killed", faults=faults, **options)
    assert ended, text
    runs.assert_equal(tmp_path / "killed", tmp_path / "reference", 2)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "attempts"), [(0, 1), (5, 2)], ids=["at once", "again"])
def test_an_exception_that_comes_again_ends_the_run(step: int, attempts: int, tmp_path: Path) -> None:
    fault = (0, {"kind": "raise", "rank": 1, "when": "batch", "step": step, "attempt": None})
    options: dict[str, Any] = {"layout": "dp_replicate=2", "ranks": 2, "steps": [9], "every": 2}
    ended, text = runs.run(tmp_path / "run", faults=[fault], max_restarts=9, **options)
    assert not ended
    assert "rank 1 failed: ArithmeticError: a fault in batch" in text
    assert text.count("Traceback") == 1
    assert noted_ranks(tmp_path / "run", attempts - 1, 2)


@pytest.mark.slow
def test_a_stopped_rank_ends_with_the_others_where_one_is_killed(tmp_path: Path) -> None:
    faults = [
        (0, {"kind": "stop", "rank": 0, "when": "batch", "step": 3, "attempt": 0}),
        (0, {"kind": "kill", "rank": 1, "when": "collective", "step": 3, "attempt": 0}),
    ]
    options: dict[str, Any] = {"layout": "dp_replicate=2", "ranks": 2, "steps": [6], "every": 2}
    ended, text = runs.run(tmp_path / "run", faults=faults, **options)
    assert ended, text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "stopped"), [("SIGKILL", False), ("SIGKILL", True), ("SIGTERM", True), ("SIGINT", False)]
)
def test_the_ranks_end_with_the_launching_process(number: str, stopped: bool, tmp_path: Path) -> None:
    """Also one that is stopped."""
    folder = tmp_path / "run"
    options = {"layout": "dp_replicate=2", "ranks": 2, "steps": [100000], "every": 50, "workers": 1}
    process = runs.start(folder, max_restarts=3, **options)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "steps-0.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        directory = Path((folder / "directory").read_text())
        assert directory.exists()
        if stopped:
            os.kill(noted_ranks(folder, 0, 2)[0], signal.SIGSTOP)
        process.send_signal(signal.Signals[number])
        process.wait(30)
        assert wait_until_gone(str(folder), 15) == []
        assert not directory.exists()
    finally:
        for pid in processes_of(str(folder)):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp_shard=2,tp=2", "pp=2,dp_replicate=2"])
def test_many_random_kills(layout: str, tmp_path: Path) -> None:
    """More on demand: ``python -m tests.elastic.kills 100``."""
    num_kills, *_ = kill_many(8, layout, tmp_path, steps=60, longest=8.0)
    assert num_kills
