"""``hydra/sweeper=optuna``: what is searched, what failed jobs tell it, and going on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from recipes.config_errors import ConfigError
from tests.launch.commands import run
from tests.sweeps.training import SLOTS, result, starts, sweep

optuna = pytest.importorskip("optuna")
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402

from recipes.sweep.search import JOURNAL, Search, search_space  # noqa: E402

LAYOUTS = "+strategy.layout={dp_shard:1},{tp:1}"


def space_of(*overrides: str) -> tuple[dict, list[str]]:
    return search_space(OverridesParser.create().parse_overrides(list(overrides)))


def search(directory: Path, num_trials: int, **options) -> Search:
    space, fixed = space_of("optimizer.lr=interval(0.0, 1.0)", LAYOUTS, "seed=1")
    asked = {"is_maximized": False, "sampler": "TPESampler", "options": {"seed": 0}, "storage": None, "name": None}
    return Search(directory, space, fixed, num_trials=num_trials, **{**asked, **options})


@pytest.mark.parametrize(
    ("override", "distribution"),
    [
        ("a=interval(0.1, 2)", FloatDistribution(0.1, 2)),
        ("a=tag(log, interval(1e-4, 1e-1))", FloatDistribution(1e-4, 1e-1, log=True)),
        ("a=int(interval(1, 8))", IntDistribution(1, 8)),
        ("a=range(1, 10, 2)", IntDistribution(1, 9, step=2)),
        ("a=range(0.5, 2, 0.5)", FloatDistribution(0.5, 1.5, step=0.5)),
        ("a=1,b,null", CategoricalDistribution(["1", "b", "null"])),
        ("a={dp_shard:2},{tp:2}", CategoricalDistribution(["{dp_shard:2}", "{tp:2}"])),
    ],
)
def test_a_key_is_searched_as_it_is_written(override: str, distribution: object):
    assert space_of(override, "seed=1", "~callbacks.learning_rate") == (
        {"a": distribution},
        ["seed=1", "~callbacks.learning_rate"],
    )


def test_nothing_to_search_is_told():
    with pytest.raises(ConfigError, match="has nothing to search; give a key several values"):
        space_of("seed=1")


def test_a_search_finds_the_better_layout_and_rate_although_jobs_fail(tmp_path: Path):
    searched = search(tmp_path, 40)
    for number, overrides in searched.jobs():
        given = dict(text.lstrip("+").split("=") for text in overrides)
        rate = float(given["optimizer.lr"])
        loss = abs(rate - 0.3) + (given["strategy.layout"] == "{tp:1}")
        searched.tell(number, math.nan if number % 10 == 0 else loss)

    best = searched.best()
    assert best is not None
    assert best["best_value"] < 0.1
    assert best["best_params"]["+strategy.layout"] == "{dp_shard:1}"
    assert len(searched.study.get_trials(states=[optuna.trial.TrialState.FAIL])) == 4
    assert (tmp_path / JOURNAL).is_file()


def test_a_search_that_was_ended_goes_on_with_the_same_jobs(tmp_path: Path):
    first = search(tmp_path, 5)
    asked = first.jobs()
    begun = [next(asked) for _ in range(3)]
    first.tell(1, 0.5)

    again = list(search(tmp_path, 5).jobs())

    assert again[:2] == [begun[0], begun[2]]
    assert [number for number, _ in again] == [0, 2, 3, 4]


def test_more_is_better_where_the_metric_says_so(tmp_path: Path):
    searched = search(tmp_path, 2, is_maximized=True)
    for number, _ in searched.jobs():
        searched.tell(number, float(number))
    best = searched.best()
    assert best is not None
    assert best["best_value"] == 1.0


def test_an_unknown_sampler_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match="Did you mean TPESampler"):
        search(tmp_path, 2, sampler="TPSampler")


@pytest.mark.slow
def test_jobs_of_a_search_run_in_slots_and_a_failed_one_does_not_stop_it(tmp_path: Path):
    keys = "optimizer.lr=0.1,0.01", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "+recipe.fails_at=0.01"
    asked = sweep(*SLOTS, *keys, directory=tmp_path / "sweep", notes=tmp_path / "notes")
    done = run(asked)

    assert done.returncode == 1, done.stderr
    results = [result(tmp_path / "sweep" / str(job)) for job in range(4)]
    assert {job["optimized_metric"] for job in results} == {"val/loss"}
    assert 0 < sum(job["error"] is not None for job in results) < 4
    assert "optimizer.lr: '0.1'" in (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    assert {job: len(steps) for job, steps in starts(tmp_path / "notes").items()} == dict.fromkeys("0123", 1)
    again = run(asked)
    assert again.returncode == 1
    assert {job: len(steps) for job, steps in starts(tmp_path / "notes").items()} == dict.fromkeys("0123", 1)
