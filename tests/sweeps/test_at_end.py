"""The end of a sweep: the status says that jobs failed, whatever lies in their directories and can't be written."""

from __future__ import annotations

import csv
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra._internal.callbacks import Callbacks
from omegaconf import OmegaConf

from recipes import batches
from recipes.sweep import at_end
from recipes.sweep.at_end import SweepTable
from recipes.sweep.curves import Point, read_curves
from recipes.sweep.importance import importance
from recipes.sweep.jobs import Jobs
from tests.sweeps.leavings import leave_job

REFERS = "data.batch_size=${per_data_rank:64}"


def end(sweep: Path) -> int:
    """The status with which Hydra, which makes a warning of what a callback raises, ends a sweep."""
    callbacks = Callbacks()
    callbacks.callbacks = [SweepTable()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            callbacks.on_multirun_end(config=OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}}))
        except SystemExit as left:
            return int(left.code or 0)
    return 0


def leave_reference(job: Path) -> None:
    OmegaConf.save(OmegaConf.create([REFERS]), job / ".hydra" / "overrides.yaml")


def leave_other_table(job: Path) -> None:
    (job / "own").mkdir()
    (job / "own" / "metrics.csv").write_text("step,split,loss\n1,train,2.5\nlast,test,1.0\ninf,test,1.0\n,\n")


def leave_other_result(job: Path) -> None:
    (job / "own").mkdir()
    for name, text in (("one", '{"accuracy": 0.9}'), ("two", "[]"), ("three", "no JSON")):
        (job / "own" / name).mkdir()
        (job / "own" / name / "result.json").write_text(text)


@pytest.mark.parametrize("leave", [leave_reference, leave_other_table, leave_other_result])
def test_the_status_tells_failed_jobs_whatever_lies_beside_them(
    leave: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    batches.register()
    leave(leave_job(tmp_path, 0, [REFERS, "seed=0"], error="boom"))
    leave(leave_job(tmp_path, 1, [REFERS, "seed=1"], loss=1.0))

    assert end(tmp_path) == 1
    assert "1 of 2 jobs failed" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()
    assert [row["job"] for row in csv.DictReader((tmp_path / "sweep.csv").open())] == ["1", "0"]


def test_a_sweep_without_failures_ends_well(tmp_path: Path):
    leave_job(tmp_path, 0, ["seed=0"], loss=1.0)
    assert end(tmp_path) == 0


@pytest.mark.parametrize("name", ["print_table", "write_csv", "_write_page"])
def test_what_can_not_be_written_is_a_warning(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def no_room(*arguments: object) -> None:
        raise OSError(28, os.strerror(28))

    leave_job(tmp_path, 0, ["seed=0"], error="boom")
    leave_job(tmp_path, 1, ["seed=1"], loss=1.0)
    monkeypatch.setattr(at_end, name, no_room)
    with caplog.at_level(logging.WARNING):
        assert end(tmp_path) == 1
    assert "No space left on device" in caplog.text
    assert (tmp_path / "sweep.csv").is_file() == (name != "write_csv")
    assert (tmp_path / "report.html").is_file() == (name != "_write_page")


def test_jobs_that_can_not_be_read_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert end(tmp_path) == 1
    assert "can't be read" in capsys.readouterr().out


def test_an_override_of_a_job_that_never_began_is_shown_as_it_was_written(tmp_path: Path):
    leave_reference(leave_job(tmp_path, 0, [REFERS]))
    (tmp_path / "0" / "result.json").unlink()
    (job,) = Jobs.read([tmp_path]).all
    assert job.values == {"data.batch_size": "${per_data_rank:64}"}


def test_numbers_in_a_table_that_is_not_the_loggers_are_shown_as_far_as_they_go(tmp_path: Path):
    leave_other_table(tmp_path)
    assert read_curves(tmp_path) == {"loss": [Point(1, None, 2.5)]}


def test_an_infinite_value_is_one_of_several_choices(tmp_path: Path):
    for job in range(12):
        clip = ("inf", "1e39", "nan", "1.0")[job % 4]
        leave_job(tmp_path, job, [f"trainer.gradient_clip_val={clip}", f"seed={job // 4}"], loss=job % 4 + job / 100)
    told = importance(Jobs.read([tmp_path]))
    assert told.shares["trainer.gradient_clip_val"] > 0.8
