"""Sweeps whose jobs submitit runs, here by its executor of this machine: each is told of, also one that is killed."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from recipes.sweep.jobs import Jobs
from recipes.sweep.result import NOT_ENDED
from recipes.sweep.submitted import is_by_submitit, survive_killed_jobs
from tests.launch.commands import ROOT
from tests.sweeps.leavings import leave_job
from tests.sweeps.training import sweep

submitit = pytest.importorskip("submitit")
from submitit.core.utils import FailedJobError, UncompletedJobError  # noqa: E402

FAILED = "rank 0 failed: ArithmeticError: the probe fails on purpose"


class Killed:
    """What submitit knows of a job that was given a number and overrides, and was killed."""

    state = "OUT_OF_MEMORY"

    def __init__(self, number: int) -> None:
        self.job_id, self.number = f"1001_{number}", number
        self.paths = SimpleNamespace(stderr=f"{self.job_id}_log.err")

    def submission(self) -> SimpleNamespace:
        return SimpleNamespace(args=([f"seed={self.number}"], "hydra.sweep.dir", self.number, "id", {}))


@pytest.mark.parametrize("error", [UncompletedJobError, FailedJobError])
def test_a_job_that_was_killed_is_a_failed_one_and_not_the_end(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def results(job: object) -> None:
        raise error("of submitit")

    monkeypatch.setattr(submitit.Job, "results", results)
    begun = leave_job(tmp_path, "some-name", ["seed=1"], error=NOT_ENDED)
    OmegaConf.save({"hydra": {"job": {"num": 1}}}, begun / ".hydra" / "hydra.yaml")
    leave_job(tmp_path, "2", ["seed=2"], error="it said why itself")
    survive_killed_jobs(tmp_path)
    returned = [submitit.Job.results(Killed(number))[0] for number in range(3)]  # type: ignore[arg-type]

    assert all(math.isnan(one.return_value) for one in returned)
    assert {job.name: (job.values["seed"], job.error) for job in Jobs.read([tmp_path]).failed} == {
        "0": ("0", "job 1001_0 was ended (OUT_OF_MEMORY); what it told is in 1001_0_log.err"),
        "2": ("2", "it said why itself"),
        "some-name": ("1", "job 1001_1 was ended (OUT_OF_MEMORY); what it told is in 1001_1_log.err"),
    }


@pytest.mark.parametrize(("name", "is_one"), [("submitit_local", True), ("slots", False)])
def test_it_is_known_by_its_launcher(name: str, is_one: bool):
    target = {"submitit_local": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"}
    config = OmegaConf.create({"hydra": {"launcher": {"_target_": target.get(name, "of.another.Launcher")}}})
    assert is_by_submitit(config) == is_one


@pytest.mark.slow
def test_a_sweep_of_submitit_ends_with_all_jobs_those_that_failed_with_their_reasons(tmp_path: Path):
    """Four jobs, of which the second raises, and the third is killed while it trains."""
    asked = "hydra/launcher=submitit_local", "optimizer.lr=0.1,0.01,0.001,0.02", "+recipe.fails_at=0.01"
    pauses = "+recipe.pause=1.0", "trainer.max_epochs=1"
    command = sweep(*asked, *pauses, directory=tmp_path / "sweep", notes=tmp_path / "notes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    lock, deadline = tmp_path / "sweep" / "2" / ".running", time.monotonic() + 300
    while not list((tmp_path / "notes").glob("2-rank0-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)

    assert process.wait(300) == 1, (tmp_path / "output").read_text()
    told = (tmp_path / "output").read_text()
    assert "2 of 4 jobs failed" in told
    assert "Traceback" not in told
    rows = {row["job"]: row for row in csv.DictReader((tmp_path / "sweep" / "sweep.csv").open())}
    assert {job: row["state"] for job, row in rows.items()} == {"0": "done", "1": "failed", "2": "failed", "3": "done"}
    assert rows["1"]["error"] == FAILED
    assert "was ended (" in rows["2"]["error"]
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert FAILED in page
    assert "2 failed" in page
