"""launcher=slurm: the script, what becomes of a warned job, and a run as tasks; SLURM's commands are stand-ins."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lightning_dist.launchers.slurm import Slurm
from recipes.sweep.jobs import Jobs
from tests.launch import tasks
from tests.launch.commands import command, run
from tests.support import fake_slurm

pytest.importorskip("submitit")


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch) -> Path:
    fake_slurm.install(tmp_path / "slurm", monkeypatch)
    return tmp_path / "slurm"


def asked(jobs: Path, **options) -> Slurm:
    return Slurm(folder=jobs / "folder", **{"num_nodes": 1, "ranks_per_node": 2, **options})


def test_the_script_asks_for_what_was_asked(jobs: Path):
    wanted = {"gpus_per_node": 4, "cpus_per_rank": 8, "memory_per_node": 64.0, "minutes": 30, "name": "mine"}
    more = {"options": {"partition": "a100", "account": "me"}, "setup": ["module load cuda"], "warning": 120}
    job = asked(jobs, num_nodes=2, **wanted, **more).submit(tasks.place)

    script = (jobs / job.job_id / "script").read_text()
    for line in (
        *("nodes=2", "ntasks-per-node=2", "gpus-per-node=4", "cpus-per-task=8", "mem=64GB", "time=30"),
        *("job-name=mine", "partition=a100", "account=me", "signal=USR1@120"),
    ):
        assert f"#SBATCH --{line}\n" in script
    assert "#SBATCH --requeue\n" in script
    assert script.index("module load cuda") < script.index("\nsrun ")
    assert job.results() == [("0", "0", "0"), ("1", "0", "1"), ("2", "1", "0"), ("3", "1", "1")]


@pytest.mark.parametrize("how", ["75", "wait"])
def test_a_job_that_was_warned_is_queued_again(how: str, jobs: Path):
    """Whether its ranks leave with the status that asks for it, or the signal ends them."""
    job = asked(jobs).submit(tasks.leave, how, str(jobs))
    if how == "wait":
        while len(list(jobs.glob("wait-0-*"))) < 2:
            assert not (jobs / job.job_id / "state").exists()
        fake_slurm.warn(jobs, job.job_id)

    assert fake_slurm.wait(jobs, job.job_id) == "COMPLETED"
    assert len(list(jobs.glob(f"{how}-1-*"))) == 2
    assert not list(jobs.glob(f"{how}-2-*"))


def test_no_requeue_where_none_is_wanted(jobs: Path):
    job = asked(jobs, requeue=False).submit(tasks.leave, "75", str(jobs))

    assert "#SBATCH --no-requeue\n" in (jobs / job.job_id / "script").read_text()
    assert fake_slurm.wait(jobs, job.job_id) == "FAILED 75"


def test_a_job_that_fails_is_not_queued_again(jobs: Path):
    job = asked(jobs).submit(tasks.leave, "raise", str(jobs))

    assert fake_slurm.wait(jobs, job.job_id) == "FAILED 1"
    assert not list(jobs.glob("raise-1-*"))
    assert "a task fails on purpose" in str(job.exception())


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no sbatch on this machine; submit from a login node"):
        asked(tmp_path).submit(tasks.place)
    with pytest.raises(ValueError, match="a job of the name interactive is a shell to Lightning"):
        asked(tmp_path, name="interactive")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"pip install 'lightning_dist\[slurm\]'"):
        asked(tmp_path).submit(tasks.place)


@pytest.mark.slow
def test_jobs_of_a_sweep_are_jobs_of_slurm(jobs: Path, tmp_path: Path):
    asked = "hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=2", "hydra.launcher.partition=a100"
    done = run(command("-m", *asked, "seed=0,1", "optimized_metric=val/loss", directory=tmp_path / "sweep"))

    assert done.returncode == 0, done.stderr
    for job in range(2):
        assert "--partition=a100" in (jobs / f"1001_{job}" / "script").read_text()
        told = json.loads((tmp_path / "sweep" / str(job) / "result.json").read_text())
        assert told["error"] is None
        assert told["metrics"]["val/loss"] < 1.0
        output = (tmp_path / "sweep" / ".submitit" / f"1001_{job}" / f"1001_{job}_0_log.out").read_text()
        assert "Initializing distributed: GLOBAL_RANK: 0, MEMBER: 1/2" in output
    assert [job.name for job in Jobs.read([tmp_path / "sweep"]).all] == ["0", "1"]
    assert (tmp_path / "sweep" / "report.html").is_file()


@pytest.mark.slow
def test_a_run_is_submitted_and_its_tasks_are_the_ranks(jobs: Path, tmp_path: Path):
    ranks = "trainer.num_nodes=2", "trainer.devices=1"
    done = run(command("launcher=slurm", "launcher.wait=true", *ranks, directory=tmp_path / "run"))

    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "run" / "result.json").read_text())
    assert told["error"] is None
    assert told["metrics"]["test/loss"] < 1.0
    output = (tmp_path / "run" / "slurm" / "1001_0_log.out").read_text()
    assert "Initializing distributed: GLOBAL_RANK: 0, MEMBER: 1/2" in output
    assert "submitted job 1001; the output of its ranks comes to" in done.stdout
