"""Experiments over layouts and seeds: what runs, and what is told of it."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lightning_dist.cli import main
from recipes import batches, job, reproduce, targets
from recipes.experiments import Band, Experiment, experiment_files
from recipes.reproduced import agreements
from tests.launch.processes import noted_pids, running
from tests.support.source import ROOT

PROBE = ["--config-dir", str(ROOT / "tests/launch/conf")]
TRUST = "targets=[tests.launch.probe]"


def run(*arguments: str, output: Path) -> tuple[int, dict[str, Any]]:
    """Exit status, and what the file says."""
    status = main(["reproduce", *arguments, *PROBE, "--output", str(output)])
    return status, json.loads((output / "reproduce.json").read_text())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., float | None]], None]:
    """In place of training: a function of layout, seed and point that gives the metric, None for a failure."""

    def replace(metric: Callable[..., float | None]) -> None:
        def end(run: Any, experiment: Any, overrides: list[str]) -> tuple[dict[str, float], str | None, float]:
            value = metric(run.layout, run.seed, dict(run.point))
            return ({}, "rank 1 failed", 1.0) if value is None else ({"test/loss": value, "val/loss": 3.0}, None, 1.0)

        monkeypatch.setattr(reproduce, "_run", end)

    return replace


@pytest.mark.slow
def test_layouts_train_with_one_batch_and_agree(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The batch of the file is that of all ranks: the losses of one rank and of two are the same."""
    status, found = run("reproduced", TRUST, "--seeds", "0", output=tmp_path)
    assert status == 0, capfd.readouterr().out
    assert [(o["layout"], o["verdict"]) for o in found["outcomes"]] == [
        ("dp_replicate=1", "within"),
        ("dp_replicate=2", "within"),
    ]
    one, two = (OmegaConf.load(tmp_path / r["directory"] / ".hydra/config.yaml") for r in found["runs"])
    assert (one.trainer.devices, two.trainer.devices) == (1, 2)
    assert found["agreements"][0]["holds"]
    assert 0 < found["outcomes"][0]["value"] < 1
    assert found["outcomes"][0]["beside"] == {"validation": found["runs"][0]["metrics"]["val/loss"], "nothing": 7}
    assert "reached" in (tmp_path / found["runs"][0]["directory"] / "run.log").read_text()
    assert "dp_replicate=2 seed 0: test/loss" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_in_progress(number: int, status: int, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    words = ["reproduced", TRUST, "--layouts", "dp_replicate=2", "trainer.max_epochs=1000000", f"recipe.notes={notes}"]
    arguments = [sys.executable, "-m", "recipes.reproduce", *words, *PROBE, "--output", str(tmp_path / "output")]
    process = subprocess.Popen(arguments, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while len(noted_pids(notes)) < 2:
            time.sleep(0.1)
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(60) == status
    finally:
        process.kill()
    assert running(noted_pids(notes)) == []


@pytest.mark.parametrize(
    ("metric", "status", "verdicts"),
    [
        (lambda layout, seed, point: 1.0, 0, {"within"}),
        (lambda layout, seed, point: 101.0, 1, {"outside"}),
        (lambda layout, seed, point: -1.0, 1, {"outside"}),
        (lambda layout, seed, point: math.nan, 1, {"outside"}),
        (lambda layout, seed, point: None if seed else 1.0, 1, {"within", "failed"}),
        (lambda layout, seed, point: 1.0 + seed * (layout == "dp_replicate=2"), 1, {"within"}),
        (lambda layout, seed, point: math.nan if layout == "dp_replicate=2" else 1.0, 1, {"within", "outside"}),
    ],
    ids=["within", "above", "below", "nan", "failed", "layouts differ", "nan in one layout"],
)
def test_the_status_says_whether_all_lie_within_and_agree(
    metric: Any, status: int, verdicts: set[str], measured: Any, tmp_path: Path
) -> None:
    measured(metric)
    found = run("reproduced", TRUST, output=tmp_path)
    assert found[0] == status
    assert {outcome["verdict"] for outcome in found[1]["outcomes"]} == verdicts
    assert len(found[1]["runs"]) == 4


def test_the_band_is_for_the_mean_over_what_is_repeated(
    measured: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(lambda layout, seed, point: 40.0 * point["data.num_rows"])
    repeated = "+reproduce.over={data.num_rows: [1, 2, 3]}"
    status, found = run("reproduced", TRUST, repeated, "--seeds", "5", output=tmp_path)
    assert status == 0  # 40, 80 and 120, of which the last alone is outside
    assert [(o["value"], o["seed"]) for o in found["outcomes"]] == [(80.0, 5), (80.0, 5)]
    assert len(found["runs"]) == 6
    shown = [line for line in capsys.readouterr().out.splitlines() if "num_rows=3" in line]
    assert shown
    assert not any("at most" in line for line in shown)


def test_words_are_told_apart_by_what_they_look_like(measured: Any, tmp_path: Path) -> None:
    measured(lambda layout, seed, point: 1.0)
    words = ["--layouts", "dp_shard=2", "pp=2 strategy.num_microbatches=1", TRUST, "trainer.max_epochs=2"]
    found = run("--seeds", "3", "reproduced", *words, output=tmp_path)[1]
    assert [(r["layout"], r["seed"]) for r in found["runs"]] == [(words[1], 3), (words[2], 3)]
    experiment = Experiment.read("reproduced", [TRUST], ROOT / "tests/launch/conf")
    arguments = reproduce._arguments(reproduce.Run("reproduced", words[2], 3, (), tmp_path), experiment, words[4:])
    assert {"trainer.devices=2", "strategy.layout='pp=2'", "strategy.num_microbatches=1", words[4]} <= {*arguments}


@pytest.mark.parametrize("metric", [1.0, None])
def test_what_is_asked_twice_runs_once_and_options_add_up(
    metric: float | None, measured: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(lambda layout, seed, point: metric)
    layouts = ["--layouts", "dp_replicate=1", "dp_replicate=1", "--layouts", "dp_replicate=2"]
    seeds = ["--seeds", "0", "0", "--seeds", "1"]
    status, found = run("reproduced", TRUST, "~callbacks.learning_rate", *layouts, *seeds, output=tmp_path)
    assert status == (0 if metric else 1)
    asked = [(layout, seed) for layout in ("dp_replicate=1", "dp_replicate=2") for seed in (0, 1)]
    assert [(o["layout"], o["seed"]) for o in found["outcomes"]] == asked
    assert len(found["runs"]) == 4


def test_a_run_that_is_no_number_is_told_as_one_that_differs() -> None:
    experiment = Experiment.read("reproduced", [TRUST], ROOT / "tests/launch/conf")
    layouts = ["dp_replicate=1", "dp_replicate=2", "tp=2"]
    runs = [reproduce.Run("reproduced", layout, 0, (), Path()) for layout in layouts]
    for values in itertools.permutations([0.5, 0.5, math.nan]):
        ended = [run.ended({"test/loss": value}, None, 1.0) for run, value in zip(runs, values, strict=True)]
        (agreement,) = agreements([experiment], ended)
        assert not agreement.holds
        assert str(agreement) == "reproduced, seed 0: test/loss is not a number under all layouts: DIFFER"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits_vitt"], "Did you mean digits_vit?"),
        (["digits_vit", "--layouts", "dp_shard=-1"], "takes as many ranks as there are"),
        (["digits_vit", "data.batch_sise=3"], "Did you mean batch_size"),
        (["probe", TRUST], "probe says neither what to expect nor under which layouts"),
        (["digits_vit", "seed=7"], "seed=7 is what the runs of digits_vit set themselves; pass --seeds instead"),
        (["digits_vit", "trainer.devices=4"], "pass --layouts instead"),
        (["digits_vit", "++strategy.layout.tp=2"], "pass --layouts instead"),
        (["digits_vit", "experiment=austen_lm"], "pass the experiment's name instead"),
        (["digits_vit", "hydra.run.dir=here"], "pass --output instead"),
        (["german_credit", "data.fold=3"], "pass reproduce.over instead"),
        (
            ["digits_vit", "strategy.num_microbatches=4", "--layouts", "pp=2 strategy.num_microbatches=2"],
            "strategy.num_microbatches=4 is what the runs of digits_vit set themselves; pass --layouts instead",
        ),
    ],
)
def test_a_mistake_is_told_in_a_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *words, *PROBE]) == 2
    assert message in capsys.readouterr().err


def test_all_leaves_out_what_has_no_data_here(
    measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the devices of this machine: the batch is dealt to the ranks of the layouts that run."""
    measured(lambda layout, seed, point: 1.0)
    monkeypatch.setattr("recipes.train._available", lambda accelerator: 3)
    OmegaConf.clear_resolver(batches.NAME)  # as in a process of its own
    files = experiment_files() | {"probe": ROOT / "tests/launch/conf/experiment/probe.yaml"}
    chosen = {name: files[name] for name in ("probe", "digits_vit", "breast_cancer")}
    monkeypatch.setattr(reproduce, "experiment_files", lambda config_dir: chosen)
    asked = ["reproduce", "all", TRUST, *PROBE, "--seeds", "0", "--output", str(tmp_path)]
    main(asked)
    output = capsys.readouterr().out
    assert "probe is left out: it says neither" in output
    assert output.count("is left out") == 1
    runs = json.loads((tmp_path / "reproduce.json").read_text())["runs"]
    assert {run["experiment"] for run in runs} == {"digits_vit", "breast_cancer"}

    chosen = {"reproduced": ROOT / "tests/launch/conf/experiment/reproduced.yaml"}
    assert main([*asked, "data.path=nowhere"]) == 2
    told = capsys.readouterr()
    told_out = " ".join(told.out.split())
    assert "reproduced is left out: it has no data here: data: data path nowhere does not exist" in told_out
    assert "no experiment is left to run" in told.err


def test_the_command_hands_all_words_to_what_the_project_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["reproduce", "this"]) == 2
    assert "has [tool.lightning_dist] reproduce: run in a clone" in capsys.readouterr().err
    (tmp_path / "pyproject.toml").write_text('[tool.lightning_dist]\nreproduce = "runs_of_mine:run"\n')
    (tmp_path / "runs_of_mine.py").write_text("def run(arguments):\n    print(arguments)\n    return 3\n")
    assert main(["reproduce", "--list", "this", "-h", "--seeds", "1"]) == 3
    assert capsys.readouterr().out == "['--list', 'this', '-h', '--seeds', '1']\n"


def test_the_list_has_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--list"]) == 0
    output = capsys.readouterr().out
    assert all(name[:10] in output for name in experiment_files())


@pytest.mark.parametrize("name", experiment_files())
def test_an_experiment_says_where_it_should_lie_and_under_which_layouts(name: str) -> None:
    """Those that train; each layout can deal the batch."""
    experiment = Experiment.read(name)
    if experiment.reproduction is None:
        return
    assert experiment.band is not None
    assert len(experiment.reproduction.seeds) >= 3
    assert len(experiment.reproduction.layouts) >= 2
    totals = set()
    for layout in experiment.reproduction.layouts:
        cfg = Experiment.read(name, reproduce.of_layout(layout)).cfg
        batches.register()
        totals.add(cfg.data.batch_size * batches.num_data_ranks(cfg))
    assert len(totals) == 1


@pytest.mark.parametrize("name", [name for name in experiment_files() if name.startswith("fashion_mnist")])
def test_a_network_of_an_experiment_takes_its_images(name: str) -> None:
    with targets.allow(targets.ALLOWED):
        module = job.build_module(Experiment.read(name).cfg)
    module.configure_model()
    assert module(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_a_batch_that_ranks_can_not_share_is_refused() -> None:
    batches.register()
    cfg = Experiment.read("digits_vit", ["trainer.devices=3"]).cfg
    with pytest.raises(Exception, match="a batch of 128 samples can't be dealt to 3 data ranks evenly"):
        _ = cfg.data.batch_size
    cfg = Experiment.read("digits_vit", ["trainer.devices=4", "strategy.layout.tp=2"]).cfg
    assert cfg.data.batch_size == 64
    cfg = Experiment.read(
        "digits_vit", ["trainer.devices=4", "strategy=ddp", "launcher.nnodes=1:2", "launcher.rdzv_endpoint=here:1"]
    ).cfg
    assert cfg.data.batch_size == 16


def test_a_band_has_two_ends() -> None:
    band = Band("test/auc", at_least=0.5, at_most=0.75)
    assert [band.holds(value) for value in (0.49, 0.5, 0.75, 0.76, math.nan)] == [False, True, True, False, False]
    assert str(band) == "at least 0.5 and at most 0.75"
