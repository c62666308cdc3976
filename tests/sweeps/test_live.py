"""Pages of sweeps that run or were interrupted: what is told of each job, by whatever ended it."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipes.config_errors import ConfigError
from recipes.sweep import live, running
from recipes.sweep.jobs import Jobs
from recipes.sweep.live import Live
from recipes.sweep.result import NOT_ENDED, JobResult
from recipes.sweep.resume import done_before, goes_on
from recipes.sweep.table import write_csv
from tests.launch.commands import ROOT
from tests.sweeps.leavings import leave_curve, leave_job


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that runs job 0 of a sweep, and prints when it does."""
    leave_job(tmp_path, 0, ["seed=0"], error=NOT_ENDED)
    code = (
        "import sys, time; from pathlib import Path; from recipes.sweep.running import running\n"
        "with running(Path(sys.argv[1])): print('runs', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "0")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        yield process
        process.kill()


def states(sweep: Path) -> dict[str, str]:
    return {job.name: job.state for job in Jobs.read([sweep]).all}


def test_a_job_runs_until_its_process_is_killed(tmp_path: Path, holder: subprocess.Popen[str]):
    assert states(tmp_path) == {"0": "running"}
    with pytest.raises(ConfigError, match=rf"has a job that still runs \(process {holder.pid} on .*; wait for its end"):
        running.refuse_running(tmp_path / "0")
    holder.send_signal(signal.SIGKILL)
    holder.wait()

    assert states(tmp_path) == {"0": "interrupted"}
    running.refuse_running(tmp_path / "0")
    write_csv(Jobs.read([tmp_path]), tmp_path / "sweep.csv")
    (row,) = csv.DictReader((tmp_path / "sweep.csv").open())
    assert (row["job"], row["state"], row["error"]) == ("0", "interrupted", NOT_ENDED)


def test_two_can_not_run_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running, "PATIENCE", 0.1)
    with running.running(tmp_path), pytest.raises(ConfigError, match="still runs"), running.running(tmp_path):
        pass
    with running.running(tmp_path):
        pass


def test_of_a_job_that_was_handed_on_nothing_is_claimed(tmp_path: Path):
    leave_job(tmp_path, 0, ["seed=0"], error=NOT_ENDED)
    with running.running(tmp_path / "0"):
        running.hand_on(tmp_path / "0", "slurm")

    assert states(tmp_path) == {"0": "not ended"}


def test_what_was_handed_on_is_not_started_again_until_it_has_ended(tmp_path: Path):
    cfg, job = OmegaConf.create({"resume": True}), tmp_path / "0"
    leave_job(tmp_path, 0, ["seed=0"], error=NOT_ENDED)
    running.hand_on(job, "slurm")
    with pytest.raises(ConfigError, match=r"was handed on \(to launcher=slurm\) and has not ended"):
        done_before(cfg, job, ["seed=0"])
    assert done_before(OmegaConf.create({"resume": False}), job, ["seed=0"]) is None
    JobResult(["seed=0"], "it failed there", {}).save(job)
    assert done_before(cfg, job, ["seed=0"]) is None  # it runs once more
    with running.running(job):
        assert not (job / running.HANDED_ON).exists()
    JobResult(["seed=0"], NOT_ENDED, {}).save(job)
    assert done_before(cfg, job, ["seed=0"]) is None


@pytest.mark.parametrize(("resume", "age", "goes"), [(True, 100, True), (False, 100, False), (False, -100, True)])
def test_a_job_elsewhere_goes_on_from_checkpoints_of_its_own(resume: bool, age: int, goes: bool, tmp_path: Path):
    """Which with ``resume=false`` are those that it left since it was handed on, before it was requeued."""
    leave_job(tmp_path, 0, ["seed=0"], error=NOT_ENDED)
    assert not goes_on(OmegaConf.create({"resume": resume}), tmp_path / "0")
    file = tmp_path / "0" / "checkpoints" / "last.ckpt"
    file.parent.mkdir(exist_ok=True)
    file.touch()
    begun = (tmp_path / "0" / "result.json").stat().st_mtime
    os.utime(file, (begun - age, begun - age))
    assert goes_on(OmegaConf.create({"resume": resume}), tmp_path / "0") == goes


def test_it_is_written_whenever_a_job_begins_or_ends_and_not_otherwise(tmp_path: Path):
    leave_job(tmp_path, 0, ["seed=0"], loss=1.0)  # by an earlier start of the sweep
    written: list[dict[str, str]] = []
    watched = Live(tmp_path, lambda: written.append(states(tmp_path)))
    assert not watched.look()
    leave_job(tmp_path, 1, ["seed=1"], error=NOT_ENDED, curve=[2, 1])
    assert watched.look()
    leave_curve(tmp_path / "1", [1.0, 0.5], first_step=20)
    assert not watched.look()
    JobResult(["seed=1"], "no memory", {}).save(tmp_path / "1")
    assert watched.look()
    assert not watched.look()

    assert written == [{"0": "done", "1": "not ended"}, {"0": "done", "1": "failed"}]


def test_what_fails_while_jobs_write_is_tried_again_until_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(live, "PAUSE", 0.01)
    tries: list[int] = []

    def write() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise FileNotFoundError("a checkpoint that was just replaced")

    watched, handler = Live(tmp_path, write), signal.getsignal(signal.SIGTERM)
    watched.start()
    leave_job(tmp_path, 0, ["seed=0"], loss=1.0)
    wait_for(lambda: len(tries) == 3)
    watched.stop()
    leave_job(tmp_path, 1, ["seed=1"], loss=1.0)
    assert len(tries) == 3
    assert signal.getsignal(signal.SIGTERM) == handler


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)
