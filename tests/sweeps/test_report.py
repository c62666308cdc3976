"""Sweeps read from their directories: what was swept, best first, as a table, as CSV and as a page."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import shlex
from io import StringIO
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from lightning_dist.cli import main
from recipes.sweep.curves import Point, read_curves, thin_out
from recipes.sweep.importance import importance
from recipes.sweep.jobs import Jobs, short_names
from recipes.sweep.metric import Metric, metric_of
from recipes.sweep.table import print_table
from tests.sweeps.leavings import leave_curve, leave_grid, leave_job

LOW, HIGH = Metric("val/loss", is_maximized=False), Metric("val/loss", is_maximized=True)
GIVEN = "experiment=probe", "optimizer.lr=0.1"


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return leave_grid(tmp_path_factory.mktemp("sweeps") / "grid")


def printed(jobs: Jobs, width: int) -> str:
    stream = StringIO()
    print_table(jobs, Console(file=stream, width=width))
    return stream.getvalue()


def data_of(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_only_what_was_swept_is_shown_best_first(grid: Path):
    jobs = Jobs.read([grid])

    assert jobs.keys == ["optimizer.lr", "strategy.layout"]
    assert jobs.fixed == ["experiment=probe"]
    assert jobs.metric == Metric("val/loss", is_maximized=False)
    assert [job.name for job in jobs.ranked] == ["6", "7", "8", "3", "5", "10", "11", "0", "1", "2", "9", "4"]
    assert [job.name for job in jobs.failed] == ["4"]


@pytest.mark.parametrize(
    ("config", "metric"),
    [
        ({"optimized_metric": "test/loss"}, Metric("test/loss", False)),
        ({"optimized_metric": "test/auc"}, Metric("test/auc", True)),
        ({"optimized_metric": "val/loss", "callbacks": {"checkpoint": {"monitor": "val/loss", "mode": "max"}}}, HIGH),
        ({"callbacks": {"checkpoint": {"monitor": "test/loss", "mode": "max"}}}, Metric("test/loss", True)),
        ({"callbacks": None, "expected": {"metric": "val/loss", "at_least": 1}}, HIGH),
        ({"callbacks": None, "expected": {"metric": "val/loss", "at_most": 1}}, LOW),
        (
            {"callbacks": None, "expected": {"metric": "val/loss", "at_least": 1, "at_most": 2}},
            Metric("val/loss", False),
        ),
        ({"callbacks": {"checkpoint": {"monitor": "val/none"}}}, Metric("test/loss", False)),
    ],
)
def test_jobs_are_compared_by_the_metric_of_their_recipe(config: dict, metric: Metric, tmp_path: Path):
    leave_job(tmp_path, 0, GIVEN, 1.0, config={"optimized_metric": None, **config})
    result = json.loads((tmp_path / "0" / "result.json").read_text())
    (tmp_path / "0" / "result.json").write_text(json.dumps(result | {"metrics": result["metrics"] | {"test/auc": 0.5}}))

    assert Jobs.read([tmp_path]).metric == metric


LESS_IS_BETTER = (
    # what the recipes log
    *("train/loss", "train/loss_step", "val/perplexity", "test/loss_per_byte", "val/bits_per_byte", "seconds"),
    *("val/unigram_loss_per_byte", "test/ngram/loss_per_byte_4", "test/gzip/loss_per_byte", "first/test/loss"),
    *("test/word_error_rate", "test/word_by_word/word_error_rate", "test/brier", "test/logistic_regression/brier"),
    *("test/calibration_error", "test/collisions", "test/expert/collisions", "step_time", "data_wait"),
    *("communication_wait",),
    # others that are usual
    *(
        "val_loss",
        "mse",
        "test/rmse/dataloader_idx_0",
        "brier_score",
        "logloss",
        "dice_loss",
        "loss1",
        "wer",
        "val/cer",
    ),
    *("MeanSquaredError", "validLoss", "time_to_train", "cost"),
)
MORE_IS_BETTER = (
    *("test/accuracy", "val/auc", "auc/0", "accuracy/3", "test/gini", "test/ks", "val/cost_weighted_accuracy"),
    *("test/sensitivity", "test/specificity", "test/sensitivity_at_specificity", "test/bleu", "test/chrf"),
    *("test/exact_match", "test/reward", "test/expert/reward", "test/speed", "test/length", "test/ridge/accuracy"),
    *(
        "sentiment_accuracy",
        "time_series/f1",
        "macro_f1",
        "mAP",
        "r2",
        "recall_at_error",
        "samples_per_second",
        "lossless",
    ),
    *("test/dice", "BinaryAUROC", "top5_accuracy"),
)


@pytest.mark.parametrize("name", [*LESS_IS_BETTER, *MORE_IS_BETTER])
def test_the_name_of_a_metric_says_which_end_of_it_is_good(name: str):
    assert metric_of(OmegaConf.create({"optimized_metric": name})) == Metric(name, name in MORE_IS_BETTER)


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_has_a_column_for_each_key_and_fits(grid: Path, width: int):
    lines = printed(Jobs.read([grid]), width).splitlines()

    table, errors = lines[:-1], lines[-1:]
    assert max(map(len, table)) <= width
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in table if line.startswith("│")]
    assert rows[0][:4] == ["6", "0.01", "{dp_shard:2}", "0.006"]
    assert rows[-1][:4] == ["4", "0.001", "{tp:2}", "failed"]
    assert len(rows) == 12
    assert errors == ["job 4: rank 1 failed: ArithmeticError: <on purpose> & quickly"]
    assert "experiment" not in "".join(lines)


def test_long_names_and_values_leave_room_for_what_was_measured(tmp_path: Path):
    key = "callbacks.some_callback.a_rather_long_name_of_a_setting"
    for job, end in enumerate("ab"):
        value = f"{'long_value_' * 8}{end}"
        leave_job(tmp_path, job, [f"{key}={value}", f"model.name={value}"], loss=1.0 + job)
    told = printed(Jobs.read([tmp_path]), 80)

    assert max(map(len, told.splitlines())) <= 80
    assert len(told.splitlines()) < 16
    assert "value_a" in told
    assert "value_b" in told
    assert "test/" not in told


def test_short_names_are_told_apart():
    names = short_names(["optimizer.lr", "model.lr", "seed", "strategy.layout.tp"])
    assert list(names.values()) == ["optimizer.lr", "model.lr", "seed", "tp"]


def test_the_command_writes_page_and_csv_of_a_sweep(grid: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(grid)]) == 0

    rows = list(csv.DictReader((grid / "sweep.csv").open()))
    assert [row["job"] for row in rows[:2]] == ["6", "7"]
    assert rows[0] | {} == rows[0] | {"optimizer.lr": "0.01", "strategy.layout": "{dp_shard:2}", "error": ""}
    assert float(rows[1]["test/loss"]) == pytest.approx(1.007)
    assert rows[-1]["error"].startswith("rank 1 failed")
    page = grid / "report.html"
    assert page.stat().st_size < 6e6
    assert str(page) in capsys.readouterr().out
    drawn = data_of(page)
    assert [job["label"] for job in drawn["jobs"]][:3] == ["6", "7", "8"]
    assert drawn["jobs"][0]["curves"]["val/loss"]["step"] == [0, 10, 20, 30]
    assert drawn["jobs"][0]["curves"]["val/loss"]["seconds"] == pytest.approx([0, 2, 4, 6], abs=0.5)
    exploded = next(job for job in drawn["jobs"] if job["label"] == "9")
    assert exploded["value"] is None
    assert exploded["curves"]["val/loss"]["value"][2:] == [None, None]


def test_sweeps_are_compared_in_a_file_that_is_named(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    leave_job(tmp_path / "other", 0, ["experiment=probe", "optimizer.lr=0.01", "model.width=8"], loss=0.5, curve=[2, 1])
    both = ["report", str(grid), str(tmp_path / "other")]

    assert main(both) == 2
    assert "--output" in capsys.readouterr().err
    assert main([*both, "--output", str(tmp_path / "both.html")]) == 0
    drawn = data_of(tmp_path / "both.html")
    assert [axis["key"] for axis in drawn["axes"]] == ["optimizer.lr", "strategy.layout", "model.width"]
    assert "other/0" in [job["label"] for job in drawn["jobs"]]
    assert "other/0" in capsys.readouterr().out
    assert (tmp_path / "both.csv").is_file()


def test_the_page_has_the_command_of_the_best_job_and_its_data_whatever_the_overrides(tmp_path: Path):
    given = ["+model.name='a b'", "recipe.prompt=it's <!-- <script> </script>", "seed=1"]
    leave_job(tmp_path, 0, given, loss=1.0)
    leave_job(tmp_path, 1, [*given[:2], "seed=2"], loss=2.0)
    assert main(["report", str(tmp_path)]) == 0
    found = re.search(r"<pre>python -m recipes.train (.*?)</pre>", (tmp_path / "report.html").read_text(), re.DOTALL)
    assert found is not None
    assert shlex.split(html.unescape(found[1])) == given

    leave_job(tmp_path, 2, [given[0], "recipe.prompt=<!-- <script>", "seed=3"], loss=3.0)
    assert main(["report", str(tmp_path)]) == 0
    assert data_of(tmp_path / "report.html")["jobs"][2]["given"]["recipe.prompt"] == "<!-- <script>"


def test_a_directory_without_jobs_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert main(["report", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "is no directory" in told
    assert "has no jobs" in told


def test_a_job_that_was_ended_from_outside_has_not_ended_well(tmp_path: Path):
    leave_job(tmp_path, 0, GIVEN, loss=1.0)
    leave_job(tmp_path, 1, GIVEN, loss=0.5)
    (tmp_path / "1" / "result.json").unlink()
    jobs = Jobs.read([tmp_path])

    assert [(job.name, job.state) for job in jobs.ranked] == [("0", "done"), ("1", "not ended")]
    assert jobs.failed == []


def test_a_job_that_was_gone_on_with_has_one_curve(tmp_path: Path):
    leave_curve(tmp_path, [5.0, 4.0, 3.5])
    leave_curve(tmp_path, [3.0, 2.0], first_step=20)
    steps, seconds, values = zip(*read_curves(tmp_path)["val/loss"], strict=True)

    assert (steps, values) == ((0, 10, 20, 30), (5.0, 4.0, 3.0, 2.0))
    assert seconds == pytest.approx([0, 2, 4, 6], abs=0.5)


def test_without_tensorboard_the_csv_logger_tells_the_steps(tmp_path: Path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text("epoch,step,train/loss,val/loss\n0,9,2.0,\n0,9,,1.5\n1,19,1.0,nan\n")
    curves = read_curves(tmp_path)

    assert curves["train/loss"] == [Point(9, None, 2.0), Point(19, None, 1.0)]
    assert curves["val/loss"][0] == Point(9, None, 1.5)
    assert math.isnan(curves["val/loss"][1].value)
    assert "epoch" not in curves


def test_long_curves_are_thinned_out_and_keep_their_ends():
    points = [Point(step, None, 0.0) for step in range(1000)]
    thin = thin_out(points, 50)
    assert (len(thin), thin[0], thin[-1]) == (50, points[0], points[-1])


def test_importance_tells_what_decides_or_that_jobs_are_too_few(grid: Path, tmp_path: Path):
    told = importance(Jobs.read([grid]))
    assert list(told.shares) == ["optimizer.lr", "strategy.layout"]
    assert told.shares["optimizer.lr"] > 0.8

    for job in range(3):
        leave_job(tmp_path, job, [f"optimizer.lr={job}"], loss=job)
    few = importance(Jobs.read([tmp_path]))
    assert few.shares == {}
    assert "3 of the jobs have a value; 8 are needed" in few.told


def test_keys_that_decide_nothing_are_not_called_important(tmp_path: Path):
    losses = [3, 1, 4, 1.5, 9, 2.6, 5, 3.5, 8, 9.5, 7, 9.2]
    for job, loss in enumerate(losses):
        leave_job(tmp_path, job, [f"model.width={job % 3}", f"model.depth={job % 2}"], loss=loss)
    told = importance(Jobs.read([tmp_path]))
    assert told.shares == {}
    assert "do not tell which job is better" in told.told
