"""A fit that is told to leave at any place leaves on all ranks, and goes on as if it had not."""

from __future__ import annotations

import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch.plugins.environments import SLURMEnvironment

from tests.preemption.training import REQUEUE, Moment, Verdict, compare, compare_at_random, start
from tests.support.parity import slow
from tests.support.ranks import run_on_ranks

SAVED = ["hpc_ckpt_1.ckpt", "hpc_ckpt_1.json", "/"]
PLACES = [
    Moment("on_train_batch_start", 3),
    Moment("on_train_batch_start", 8),
    Moment("on_validation_start", 1),
    Moment("on_validation_batch_start", 9),
    Moment("on_validation_end", 3),
    Moment("on_train_epoch_end", 1),
]


def on(layout: str, *args: Any, function: Any = compare) -> list[list[Verdict]]:
    return run_on_ranks(2, function, layout, *args) if "=2" in layout else [function(layout, *args)]


def assert_exact(verdicts: list[Verdict], files: list[str] | None = SAVED) -> None:
    for verdict in verdicts:
        assert verdict.statuses == [REQUEUE, None], verdict
        assert verdict.same_weights, verdict
        assert verdict.same_logs, verdict
        assert files is None or verdict.files == files, verdict
        assert verdict.seconds < 10, verdict


@pytest.mark.parametrize("ends", [{}, {"max_epochs": -1, "max_steps": 24}], ids=["epochs", "steps"])
def test_one_process_goes_on_bitwise_from_every_place(ends: dict[str, int], tmp_path: Path) -> None:
    (verdicts,) = on("dp_shard=1", tmp_path, PLACES, ends)
    assert_exact(verdicts)
    assert [verdict.handled for verdict in verdicts] == [1] * len(PLACES)


def test_before_the_first_step_nothing_is_saved(tmp_path: Path) -> None:
    (verdicts,) = on("dp_shard=1", tmp_path, [Moment("on_sanity_check_start", 1)], {})
    assert_exact(verdicts, ["/"])


def test_a_step_that_accumulates_is_finished(tmp_path: Path) -> None:
    """Or, in a validation between the batches of one, begun again."""
    moments = [Moment("on_train_batch_start", 2), Moment("on_validation_batch_start", 1)]
    (verdicts,) = on("dp_shard=1", tmp_path, moments, {"accumulate_grad_batches": 3})
    assert_exact(verdicts)


def test_a_last_validation_is_finished(tmp_path: Path) -> None:
    moments = [Moment("on_validation_batch_start", 2), Moment("on_validation_start", 1)]
    (verdicts,) = on("dp_shard=1", tmp_path, moments, {"max_steps": 4})
    for verdict in verdicts:
        assert verdict.statuses == [None]
        assert verdict.files == ["/"]
        assert verdict.same_logs


@pytest.mark.parametrize("background", [False, True])
def test_told_during_a_save(background: bool, tmp_path: Path) -> None:
    options = {"strategy": {"async_save": background}, "saves": {"every_n_train_steps": 2}}
    (verdicts,) = on("dp_shard=1", tmp_path, [Moment("on_save_checkpoint", 2)], options)
    assert_exact(verdicts)


def test_sigusr1_asks_too(tmp_path: Path) -> None:
    moments = [Moment("on_train_batch_start", 3, number=signal.SIGUSR1)]
    (verdicts,) = on("dp_shard=1", tmp_path, moments, {})
    assert_exact(verdicts)
    assert [verdict.handled for verdict in verdicts] == [0]


def test_a_deadline_asks_too(tmp_path: Path) -> None:
    status, *_ = start("dp_shard=1", tmp_path, None, {"strategy": {"max_time": timedelta(seconds=0)}})
    assert status == REQUEUE


def test_a_users_handler_of_sigusr1_keeps_it(tmp_path: Path) -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: got.append(number))
    try:
        status, *_ = start("dp_shard=1", tmp_path, Moment("on_train_batch_start", 3, number=signal.SIGUSR1), {})
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (status, got) == (None, [signal.SIGUSR1])


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_queues_a_job_again_that_it_has_warned(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol, asked, folder = tmp_path / "scontrol", tmp_path / "asked", tmp_path / "run"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    folder.mkdir()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, value in {"JOB_ID": "7", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    moment = Moment("on_train_batch_start", 3, number=number)
    status, *_ = start("dp_shard=1", folder, moment, {"plugins": [SLURMEnvironment()]})
    assert status == REQUEUE
    assert asked.exists() == (number == signal.SIGUSR1)  # SLURM itself knows why it sent SIGTERM
    if asked.exists():
        assert asked.read_text().split() == ["requeue", "7"]
        _, logged, *_ = start("dp_shard=1", folder, None, {"plugins": [SLURMEnvironment()]})
        assert logged[0][:2] == ("loss_step", 3)
        assert not list(folder.iterdir())


def test_another_script_does_not_go_on_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = Moment("on_train_batch_start", 3)
    assert start("dp_shard=1", tmp_path, moment, {})[0] == REQUEUE
    with monkeypatch.context() as other:
        other.setattr(sys, "argv", [*sys.argv, "--lr=1"])
        _, logged, *_ = start("dp_shard=1", tmp_path, None, {})
    assert logged[0][:2] == ("loss_step", 0)
    _, logged, *_ = start("dp_shard=1", tmp_path, None, {})
    assert logged[0][:2] == ("loss_step", 3)


def _ends_by_max_time(folder: Path) -> list[int | None]:
    options = {"max_time": {"seconds": 1}, "max_epochs": -1}
    if dist.get_rank() == 1:
        time.sleep(0.3)  # its clock begins later
    status, logged, *_ = start("dp_shard=2", folder, None, options)
    return [status, logged[-1][1]]


def test_max_time_of_the_trainer_ends_the_fit_on_all_ranks(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, _ends_by_max_time, tmp_path)
    assert first == second
    assert first[0] is None


@pytest.mark.parametrize("layout", [slow("dp_shard=2"), slow("tp=2"), slow("pp=2")])
def test_one_rank_alone_is_told(layout: str, tmp_path: Path) -> None:
    places = [
        Moment("on_train_batch_start", 3, ranks=(1,)),
        Moment("on_validation_batch_start", 2, ranks=(1,)),
        Moment("on_train_epoch_end", 1, ranks=(0,)),
    ]
    for verdicts in on(layout, tmp_path, places, {}):
        assert_exact(verdicts)
        assert [verdict.places for verdict in verdicts] == [["batch"], ["validation"], ["batch"]]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp_shard=1", "dp_shard=2", "tp=2", "pp=2"])
def test_twenty_random_moments(layout: str, tmp_path: Path) -> None:
    for verdicts in on(layout, tmp_path, 20, 20, {}, function=compare_at_random):
        for verdict in verdicts:
            if verdict.statuses != [None]:  # told after the end
                assert_exact([verdict], None)
            assert verdict.same_weights
            assert verdict.same_logs
