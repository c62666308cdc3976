"""Jobs side by side in slots: all slots are busy while jobs wait, failures stop no other, signals end all."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from lightning_dist.elastic.signals import REQUEUE_STATUS
from recipes.config_errors import ConfigError
from recipes.sweep import slots
from recipes.sweep.curves import read_curves
from recipes.sweep.jobs import Jobs
from recipes.sweep.machine import Machine
from tests.launch.commands import ROOT, run
from tests.launch.processes import running
from tests.sweeps.training import SLOTS, result, starts, sweep


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Three learning rates in two slots; under the second the job fails."""
    place = tmp_path_factory.mktemp("three")
    rates = "optimizer.lr=0.1,0.01,0.001", "+recipe.fails_at=0.01"
    return place, run(sweep(*SLOTS, *rates, directory=place / "sweep", notes=place / "notes"))


def test_a_failed_job_stops_no_other_and_is_the_status(three):
    place, done = three
    assert done.returncode == 1, done.stderr
    failed = "rank 0 failed: ArithmeticError: the probe fails on purpose"
    assert [result(place / "sweep" / str(job))["error"] for job in range(3)] == [None, failed, None]
    assert "1 of 3 jobs failed" in done.stdout
    assert f"job 1: {failed}" in done.stdout
    assert (place / "sweep" / "report.html").is_file()
    rows = list(csv.DictReader((place / "sweep" / "sweep.csv").open()))
    assert [row["optimizer.lr"] for row in rows] == ["0.1", "0.001", "0.01"]
    assert rows[-1]["error"] == failed


def test_what_a_job_prints_is_in_its_directory(three):
    place, done = three
    assert "Traceback" not in done.stdout + done.stderr
    assert "Traceback" in (place / "sweep" / "1" / "console.log").read_text()
    assert "#1 ends after" in done.stdout


def test_jobs_run_in_processes_of_their_own_that_end(three):
    place, _ = three
    pids = [int(note.name.rpartition("-")[2]) for note in (place / "notes").iterdir()]
    assert len(set(pids)) == 3
    assert running(pids) == []


ONE_BY_ONE = ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "launcher"),
    [
        (signal.SIGKILL, SLOTS),
        (signal.SIGINT, SLOTS),
        (signal.SIGTERM, SLOTS),
        (signal.SIGTERM, ONE_BY_ONE),
        (signal.SIGKILL, ONE_BY_ONE),
    ],
)
def test_a_sweep_that_was_ended_goes_on_and_each_job_is_done_once(
    how: signal.Signals, launcher: tuple[str, ...], tmp_path: Path
):
    steps = "trainer.max_epochs=4", "+recipe.pause=0.15", "trainer.limit_train_batches=6"
    asked = sweep(*launcher, "seed=0,1,2", *steps, directory=tmp_path / "sweep", notes=tmp_path / "notes")
    first = subprocess.Popen(asked, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    third = tmp_path / "sweep" / "2" / "checkpoints" / "last.ckpt"
    wait_for(third.exists)  # the jobs before it have ended, or one of them runs
    done = [job for job in "01" if result(tmp_path / "sweep" / job)["error"] is None]
    first.send_signal(how)
    first.wait(60)
    pids = [int(note.name.rpartition("-")[2]) for note in (tmp_path / "notes").iterdir()]
    wait_for(lambda: running(pids) == [] and not Jobs.read([tmp_path / "sweep"]).of_state("running"))
    terminated = 143 if launcher else REQUEUE_STATUS  # that of the run itself, which says that another goes on
    assert first.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: terminated}[how]
    assert done
    jobs = {job.name: job.state for job in Jobs.read([tmp_path / "sweep"]).all}
    assert jobs["2"] == "interrupted"
    assert set(jobs.values()) == {"done", "interrupted"}
    page = tmp_path / "sweep" / "report.html"
    if how != signal.SIGKILL:
        told = {row["job"]: row["state"] for row in csv.DictReader((tmp_path / "sweep" / "sweep.csv").open())}
        assert told == jobs
        assert f"{list(jobs.values()).count('interrupted')} interrupted" in page.read_text()

    written = {job: (tmp_path / "sweep" / job / "result.json").stat().st_mtime_ns for job in done}
    again = run(asked)

    assert again.returncode == 0, again.stderr
    assert written == {job: (tmp_path / "sweep" / job / "result.json").stat().st_mtime_ns for job in done}
    begun = starts(tmp_path / "notes")
    assert all(begun[job] == [0] for job in done)
    first_step, second_step = begun["2"]
    assert first_step == 0
    assert second_step >= 6
    assert all(result(tmp_path / "sweep" / job)["error"] is None for job in "012")
    rows = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").open()))
    assert sorted(row["job"] for row in rows) == ["0", "1", "2"]
    assert "3 done" in page.read_text()
    steps_logged = [point.step for point in read_curves(tmp_path / "sweep" / "2")["train/loss"]]
    assert steps_logged == list(range(24))


def test_another_sweep_does_not_go_on_in_the_directory(three):
    place, _ = three
    before = result(place / "sweep" / "0")
    other = "optimizer.lr=0.2,0.01,0.001", "+recipe.fails_at=0.01"
    done = run(sweep(*SLOTS, *other, directory=place / "sweep", notes=place / "notes"))

    assert done.returncode == 1
    assert "has a job of another sweep (optimizer.lr=0.1); pass another hydra.sweep.dir" in done.stderr
    assert "Traceback" not in done.stderr
    assert result(place / "sweep" / "0") == before


@pytest.mark.slow
def test_twelve_jobs_in_two_slots_take_the_time_of_six(tmp_path: Path):
    """Learning rates by layouts, of which one is made to fail, killed in the middle and resumed."""
    grid = "optimizer.lr=0.1,0.01,0.001,0.0001", "+strategy.layout={dp_shard:2},{tp:2},{dp_replicate:2}"
    steps = "+recipe.fails_at='0.01 tp=2'", "trainer.devices=2", "+recipe.pause=0.5"
    done = run(sweep(*SLOTS, *grid, *steps, directory=tmp_path / "sweep", notes=tmp_path / "notes"), seconds=400)

    assert done.returncode == 1, done.stderr
    jobs = Jobs.read([tmp_path / "sweep"])
    assert [job.name for job in jobs.failed] == ["4"]
    assert len([job for job in jobs.all if job.state == "done"]) == 11
    assert {job: len(steps) for job, steps in starts(tmp_path / "notes").items()} == {str(job): 1 for job in range(12)}


@pytest.mark.parametrize(
    "machine", [Machine(None, 2), Machine(2, 2), Machine(1, 2, ("0", "1"), "CUDA_VISIBLE_DEVICES")]
)
@pytest.mark.parametrize("wrong", [0, "x"])
def test_a_job_that_can_not_start_has_failed_and_ends_no_other(
    wrong: object, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(slots, "run", lambda call: None)
    jobs = []
    for number, devices in enumerate([1, wrong, 2, wrong]):
        own = {"hydra": {"overrides": {"task": [f"trainer.devices={devices}"]}}, "start_method": "fork"}
        config = OmegaConf.merge(job_config(devices), own)
        jobs.append(slots.SlotJob(number, config, tmp_path / str(number), [], ("recipes.train", "train")))
    ended = list[int]()

    slots.Slots(machine, ()).run(jobs, lambda job: ended.append(job.number))

    assert sorted(ended) == [0, 1, 2, 3]
    told = {job.name: job.error for job in Jobs.read([tmp_path]).all}
    assert told == dict.fromkeys("13", f"trainer.devices={wrong}: pass a number of ranks, a list of devices, or auto")


def wait_for(what: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---------------------------------------------------------------- what jobs share


def job_config(devices: object, accelerator: str = "auto") -> DictConfig:
    return OmegaConf.create({"trainer": {"devices": devices, "accelerator": accelerator}})


def test_each_job_has_accelerators_of_its_own():
    machine = Machine(None, 8, ("2", "3", "5", "7"), "CUDA_VISIBLE_DEVICES")
    first, second = machine.take(machine.needs(job_config(2))), machine.take(machine.needs(job_config(1)))

    assert (first, second) == (["2", "3"], ["5"])
    assert machine.environment(first, 2)["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert machine.take(2) is None
    assert machine.has_slot
    machine.give_back(first)
    assert machine.take(3) == ["2", "3", "7"]
    assert not machine.has_slot


def test_slots_divide_the_accelerators_of_jobs_that_take_all():
    machine = Machine(2, 8, ("0", "1", "2", "3"), "CUDA_VISIBLE_DEVICES")
    assert [machine.needs(job_config(devices)) for devices in ("auto", -1, 3, 9)] == [2, 2, 3, 4]
    assert machine.needs(job_config(4, accelerator="cpu")) == 0
    with pytest.raises(ConfigError, match="names devices, which hydra/launcher=slots deals out"):
        machine.needs(job_config([0, 1]))


def test_without_slots_there_is_a_core_for_each_rank():
    machine = Machine(None, 4)
    assert [machine.needs(job_config(devices)) for devices in (1, 3, 8)] == [1, 3, 4]
    assert machine.take(3) is not None
    assert machine.take(2) is None


def test_slots_limit_the_jobs_whatever_their_ranks():
    machine = Machine(2, 2)
    taken = [machine.take(machine.needs(job_config(8))) for _ in range(3)]
    assert taken == [[], [], None]


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Machine(2, 16).environment([], 4) == {"OMP_NUM_THREADS": "2"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Machine(2, 16).environment([], 4) == {"OMP_NUM_THREADS": "3"}
