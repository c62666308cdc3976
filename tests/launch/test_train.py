"""``python -m recipes.train``: one process composes, the ranks run, and what fails is told once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.commands import ROOT, command, run
from tests.launch.processes import noted_pids, running
from tests.support.parity import slow


def result(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())


def test_two_ranks_train_test_predict_and_report_once(tmp_path: Path):
    refers = "data.batch_size=${per_data_rank:8}"  # to the ranks of the run, which Hydra's own config has not
    done = run(command("predict=true", refers, directory=tmp_path))

    assert done.returncode == 0, done.stderr
    assert refers in result(tmp_path)["overrides"]
    assert done.stdout.count("Initializing distributed: GLOBAL_RANK: 0, MEMBER: 1/2") == 1
    assert "GLOBAL_RANK: 1" not in done.stdout + done.stderr
    assert done.stdout.count("at most 100: reached") == 1
    assert "sample of 4 rows" in done.stdout
    assert result(tmp_path)["metrics"]["test/loss"] < 1.0
    assert result(tmp_path)["error"] is None
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert (tmp_path / ".hydra" / "config.yaml").exists()


@pytest.mark.slow
def test_sweep_goes_on_after_a_failed_job_and_says_so(tmp_path: Path):
    notes = tmp_path / "notes"
    notes.mkdir()
    done = run(command("-m", "recipe.fail_rank=1,null", f"recipe.notes={notes}", "test=false", directory=tmp_path))

    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert output.count("Traceback (most recent call last)") == 1
    assert "rank 1 failed: ArithmeticError: the probe fails on purpose" in output
    assert "1 of 2 jobs failed" in done.stdout
    assert result(tmp_path / "0")["error"].startswith("rank 1 failed: ArithmeticError")
    assert result(tmp_path / "1")["error"] is None
    assert len(noted_pids(notes)) == 4
    assert running(noted_pids(notes)) == []


@pytest.mark.slow
def test_single_failed_job_exits_with_status_1(tmp_path: Path):
    done = run(command("recipe.fail_rank=0", "trainer.devices=1", directory=tmp_path))

    assert done.returncode == 1
    assert (done.stdout + done.stderr).count("Traceback (most recent call last)") == 1
    assert "frames of libraries" in done.stderr
    assert done.stderr.rstrip().endswith("ArithmeticError: the probe fails on purpose")


@pytest.mark.slow
def test_interrupt_ends_the_ranks_and_the_sweep(tmp_path: Path):
    notes = tmp_path / "notes"
    notes.mkdir()
    arguments = command("-m", "seed=0,1", "trainer.max_epochs=1000000", f"recipe.notes={notes}", directory=tmp_path)
    sweep = subprocess.Popen(
        arguments, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )
    assert sweep.stdout is not None
    try:
        assert any("rank 0 steps" in line for line in sweep.stdout)
        sweep.send_signal(signal.SIGINT)
        sweep.communicate(timeout=30)
    finally:
        sweep.kill()
    assert sweep.returncode == 130
    assert running(noted_pids(notes)) == []
    assert not (tmp_path / "1").exists()


@pytest.mark.slow
def test_ranks_start_again_as_often_as_the_launcher_may(tmp_path: Path):
    notes = tmp_path / "notes"
    notes.mkdir()
    fails = ["recipe.fail_rank=1", "recipe.fail_how=kill", f"recipe.notes={notes}"]
    done = run(command("launcher.max_restarts=1", *fails, directory=tmp_path))

    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert output.count("starting all ranks again (restart 1): rank 1 was killed (SIGKILL)") == 1
    assert result(tmp_path)["error"].startswith("rank 1 was killed (SIGKILL)")
    assert len(noted_pids(notes)) == 4
    assert running(noted_pids(notes)) == []


@pytest.mark.slow
def test_under_torchrun_the_ranks_join(tmp_path: Path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m"]
    done = run([*torchrun, *command(directory=tmp_path)[2:]])

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Initializing distributed: GLOBAL_RANK: 0, MEMBER: 1/2") == 1
    assert done.stdout.count("at most 100: reached") == 1
    assert result(tmp_path)["error"] is None


@pytest.mark.slow
def test_sweep_under_torchrun_is_refused():
    done = run(command("-m", "seed=0,1"), RANK="0", WORLD_SIZE="2")
    assert done.returncode == 1
    assert "without torchrun" in done.stderr


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("optimizer.lrr=1", ["no key optimizer.lrr", "Did you mean lr?"]),
        slow("strategi=ddp", ["no key strategi", "Did you mean strategy"]),
        slow("trainer.max_epoch=3", ["no key trainer.max_epoch", "max_epochs"]),
        ("strategy=dpp", ["Available options in 'strategy'", "Did you mean ddp"]),
        slow("model=", ["Available options in 'model'"]),
        slow("model.in_features=???", ["needs a value for model.in_features"]),
        slow("trainer.num_nodes=2", ["trainer.num_nodes=2", "torchrun"]),
        slow("launcher.nnodes=2", ["launcher: several nodes need an endpoint"]),
    ],
)
def test_wrong_config_is_told_in_one_message(wrong: str, told: list[str], tmp_path: Path):
    done = run(command(wrong, directory=tmp_path))

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for part in told:
        assert part in done.stderr


@pytest.mark.slow
def test_wrong_layouts_fail_their_jobs_before_a_rank_starts(tmp_path: Path):
    layouts = "+strategy.layout={dp_shard:3},{dp_shrad:2}"
    done = run(command("-m", layouts, "trainer.devices=1,0", directory=tmp_path))

    assert done.returncode == 1
    assert "4 of 4 jobs failed" in done.stdout
    told = [result(tmp_path / str(job))["error"] for job in range(4)]
    assert told[0].startswith("strategy.layout: layout dp_shard=3 needs 3 ranks, but there is 1; layouts that fit")
    assert told[2].startswith("strategy.layout: layout has no axis 'dp_shrad'; did you mean 'dp_shard'?")
    assert told[3].startswith("trainer.devices=0: pass a number of ranks")


@pytest.mark.slow
def test_wrong_data_path_is_told_without_a_traceback(tmp_path: Path):
    done = run(command("data.path=/nowhere", "trainer.devices=1", directory=tmp_path))

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "data: data path /nowhere does not exist; pass data.path=" in done.stderr


def test_cfg_help_and_tab_completion_answer():
    resolved = run(
        command("--cfg", "job", "--resolve", "data.batch_size=${per_data_rank:8}", "trainer.devices=2")
    ).stdout
    assert "_target_: tests.launch.probe.Probe" in resolved
    assert "batch_size: 4" in resolved
    shown = run(command("--help")).stdout
    assert "strategy: ddp, fsdp, hybrid" in shown
    line = "python recipes/train.py strategy="
    completed = run([sys.executable, "recipes/train.py", "-sc", "query=bash"], COMP_LINE=line)
    assert completed.stdout.split() == ["strategy=ddp", "strategy=fsdp", "strategy=hybrid"]
