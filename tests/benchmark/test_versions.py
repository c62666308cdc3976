"""Two versions of the package take turns, each with what is its own."""

from __future__ import annotations

import argparse
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.benchmark import versions
from recipes.benchmark.__main__ import main
from recipes.benchmark.results import Line, Record, counted
from recipes.benchmark.version_process import VersionProcesses
from recipes.benchmark.version_rank import Losses, Task, Turns
from tests.support.ranks import run_on_ranks
from tests.support.source import ROOT

TASK = Task("dp_replicate=2", "vit_tiny", num_steps=5, check_steps=2)


def _turns_of_a_rank() -> tuple[list[dict[str, Any]], list[float]]:
    answers: list[dict[str, Any]] = []
    losses = Losses()
    trainer = TASK.trainer(Turns(io.StringIO("take 2\ntake 3\nend\n"), answers.append))
    trainer.callbacks.append(losses)
    trainer.fit(*TASK.module_and_loader(TASK.num_steps))
    return answers, losses.seen


def test_a_rank_trains_as_many_steps_as_it_is_told_to() -> None:
    for answers, losses in run_on_ranks(2, _turns_of_a_rank):
        assert [len(answer["wall"]) for answer in answers] == [2, 3]
        assert all(answer["user"] >= 0 and min(answer["wall"]) > 0 for answer in answers)
        assert len(losses) == 5


def test_a_rank_whose_benchmark_ended_ends() -> None:
    with pytest.raises(SystemExit):
        Turns(io.StringIO(), print).on_train_start()


@pytest.mark.parametrize(
    ("layout", "ranks"), [("dp_replicate=2,dp_shard=3,tp=2", 6), ("tp=2", 1), ("pp=2,dp_shard=2", 2)]
)
def test_batches_are_as_many_as_the_ranks_with_different_samples_need(layout: str, ranks: int) -> None:
    assert len(Task(layout, "vit_tiny", 4, 2).module_and_loader(4)[1]) == 4 * ranks


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    options = argparse.Namespace(against=tmp_path)
    with pytest.raises(ValueError, match="no lightning_dist in it; pass the folder of a checkout"):
        versions.measure(options, Record(tmp_path, "versions", {}))


@pytest.mark.slow
def test_a_version_that_steps_twice_is_found(tmp_path: Path) -> None:
    other = tmp_path / "other" / "lightning_dist"
    shutil.copytree(ROOT / "lightning_dist", other, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "__init__.py").open("a") as file:
        file.write(
            "\n_step = HybridStrategy.optimizer_step\n"
            "HybridStrategy.optimizer_step = lambda self, *a, **k: (_step(self, *a, **k), _step(self, *a, **k))[1]\n"
        )
    small = ["--layouts", "dp_shard=2", "pp=2", "--models", "llama_tiny", "--rounds", "2", "--steps", "2"]
    where = ["--against", str(other.parent), "--output", str(tmp_path)]

    assert main(["versions", *where, *small, "--control", "--warmup", "1"]) == 1

    lines = json.loads((tmp_path / "versions.json").read_text())["lines"]
    verdicts = {line["what"]: line["verdict"] for line in lines if "float64" in line["group"]}
    assert verdicts == {
        f"{layout}, llama_tiny: this and {name}": verdict
        for layout in ("dp_shard=2", "pp=2")
        for name, verdict in (("other", "missed"), ("this again", "reached"))
    }
    timed = [line for line in lines if "float64" not in line["group"]]
    assert len(timed) == 2 * 2 * 2  # layouts, clocks, versions
    assert all(len(line["data"]["paired_ratios"]) == 2 for line in timed)


def test_a_layout_that_fails_is_told_when_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []

    class Processes:
        def __init__(self, *_: object) -> None:
            started.append(self)

        def __enter__(self) -> Processes:
            return self

        def __exit__(self, *_: object) -> None:
            started.remove(self)

    def measured(model: str, layout: str, *_: object) -> Iterator[Line]:
        assert len(started) == 2
        if layout == "tp=2":
            raise RuntimeError("rank 0 of other ended with 1")
        yield counted("step", layout, 1, 1, None)

    monkeypatch.setattr(versions, "VersionProcesses", Processes)
    monkeypatch.setattr(versions, "_measure", measured)
    with pytest.raises(RuntimeError, match=r"^rank 0 of other ended with 1$"):
        main(["versions", "--against", str(ROOT), "--output", str(tmp_path), "--models", "vit"])
    lines = json.loads((tmp_path / "versions.json").read_text())["lines"]
    assert [line["what"] for line in lines] == ["dp_replicate=2", "dp_shard=2", "pp=2"]
    assert not started


@pytest.mark.slow
def test_a_rank_that_fails_is_told_with_what_it_printed(tmp_path: Path) -> None:
    package = tmp_path / "lightning_dist"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('too old')")
    with (
        VersionProcesses("other", tmp_path, 1, "cpu") as processes,
        pytest.raises(RuntimeError, match=r"rank 0 of other .* ended with 1:(.|\n)*too old"),
    ):
        processes.take(1)
