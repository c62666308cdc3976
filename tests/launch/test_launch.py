"""launch: ranks start together, end together, and the first failure is told once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lightning_dist.elastic import WorkerFailed, is_launched, launch
from lightning_dist.elastic.failures import short_traceback
from tests.launch import workers
from tests.launch.processes import noted_pids, running


@pytest.mark.slow
def test_results_come_by_rank_and_the_caller_is_left_as_it_was(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = dict(os.environ)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    results = launch(workers.describe, str(tmp_path), num_processes=2)

    assert [result["rank"] for result in results] == [0, 1]
    assert [result["ranks"] for result in results] == [2.0, 2.0]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [result["threads"] for result in results] == [threads, threads]
    assert len(noted_pids(tmp_path)) == 2
    assert running(noted_pids(tmp_path)) == []
    assert dict(os.environ) == environment
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.slow
def test_the_rank_that_failed_first_is_told_once_and_all_end(tmp_path: Path, capfd):
    with pytest.raises(WorkerFailed) as failure:
        launch(workers.fail_as_second_rank, str(tmp_path), num_processes=2)

    assert failure.value.rank == 1
    assert isinstance(failure.value.exception, ArithmeticError)
    text = str(failure.value)
    assert text.startswith("rank 1 failed: ArithmeticError: the second rank fails on purpose")
    assert text.count("Traceback") == 1
    assert "fail_as_second_rank" in text
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert len(noted_pids(tmp_path)) == 2
    assert running(noted_pids(tmp_path)) == []


@pytest.mark.slow
def test_killed_rank_restarts_all_ranks(tmp_path: Path):
    assert launch(workers.die_once, str(tmp_path), num_processes=2, max_restarts=1) == [1, 1]
    assert len(noted_pids(tmp_path)) == 4
    assert running(noted_pids(tmp_path)) == []


@pytest.mark.slow
def test_killed_rank_is_told_by_its_signal(tmp_path: Path):
    with pytest.raises(WorkerFailed, match=r"rank 1 was killed \(SIGKILL\)"):
        launch(workers.die_once, str(tmp_path), num_processes=2)


@pytest.mark.parametrize(("num_processes", "max_restarts"), [(0, 0), (1, -1)])
def test_numbers_that_make_no_sense_are_refused(num_processes: int, max_restarts: int):
    with pytest.raises(ValueError, match="launch"):
        launch(workers.describe, num_processes=num_processes, max_restarts=max_restarts)


@pytest.mark.parametrize(
    ("environment", "launched"),
    [
        ({}, False),
        ({"TORCHELASTIC_RUN_ID": "1", "RANK": "0"}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"}, False),
    ],
)
def test_a_rank_knows_that_it_was_launched(environment: dict[str, str], launched: bool, monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_launched() is launched


def test_short_traceback_folds_runs_of_library_frames():
    import torch

    layer = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(3, 3))])
    try:
        layer(torch.ones(1, 2))
    except RuntimeError as error:
        lines = short_traceback(error).splitlines()
    assert any("frames of libraries" in line for line in lines)
    assert sum(line.startswith("  File") for line in lines) == 3
    assert lines[-1].startswith("RuntimeError")
