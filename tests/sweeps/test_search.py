"""``hydra/sweeper=optuna``: what is searched, what failed jobs tell it, and going on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf

from recipes import targets, train
from recipes.config_errors import ConfigError
from recipes.experiments import CONF
from recipes.sweep.jobs import Jobs as SweptJobs
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
    directory.mkdir(exist_ok=True)
    asked = {
        "space": space,
        "fixed": fixed,
        "is_maximized": False,
        "sampler": "TPESampler",
        "options": {"seed": 0},
        "storage": None,
        "name": None,
    }
    return Search(directory, num_trials=num_trials, **{**asked, **options})


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


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"is_maximized": True}, "direction minimize"),
        ({"fixed": ["seed=2"]}, "seed=1"),
        ({"space": {"optimizer.lr": FloatDistribution(0.0, 1.0), "a": CategoricalDistribution(["1", "2"])}}, "layout"),
        ({"space": {"optimizer.lr": FloatDistribution(0.0, 2.0)}}, "optimizer.lr: "),
    ],
)
def test_another_search_does_not_go_on_in_the_directory(change: dict, told: str, tmp_path: Path):
    first = search(tmp_path, 2)
    for number, _ in first.jobs():
        first.tell(number, 1.0)
    with pytest.raises(ConfigError, match=rf"was begun otherwise \(.*{told}.*\); pass another hydra.sweep.dir"):
        search(tmp_path, 4, **change)
    assert len(list(search(tmp_path, 4, fixed=["seed=1", "resume=false"]).jobs())) == 2


def test_a_search_that_gets_more_trials_tries_other_points(tmp_path: Path):
    tried = []
    for num_trials in (3, 6, 9):
        searched = search(tmp_path, num_trials)
        for number, overrides in searched.jobs():
            tried.append(overrides[1])
            searched.tell(number, math.nan)
    assert len(set(tried)) == 9


@pytest.mark.parametrize("sampler", ["GridSampler", "BruteForceSampler"])
def test_a_search_of_finitely_many_points_ends_with_the_last(sampler: str, tmp_path: Path):
    values = ["1", "2", "3"]
    options = {"seed": 0} | ({"search_space": {"a": values}} if sampler == "GridSampler" else {})
    space = {"a": CategoricalDistribution(values)}
    tried = []
    for most in (2, 20, 20):
        searched = search(tmp_path, most, space=space, sampler=sampler, options=options)
        for number, overrides in searched.jobs():
            tried.append(overrides[-1])
            searched.tell(number, float(number))
    assert sorted(tried) == ["a=1", "a=2", "a=3"]
    assert len(searched.study.get_trials(states=[optuna.trial.TrialState.COMPLETE])) == 3


def test_a_storage_needs_the_name_of_a_study(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"may hold several searches; pass hydra\.sweeper\.study_name=NAME too"):
        search(tmp_path, 2, storage=f"sqlite:///{tmp_path}/search.db")


def test_two_processes_search_in_one_study(tmp_path: Path):
    """Each runs its own jobs, together as many as were asked for; each hears of a job once."""
    shared = {"storage": f"sqlite:///{tmp_path}/search.db", "name": "both"}
    one, other = search(tmp_path / "one", 5, **shared), search(tmp_path / "other", 5, **shared)
    asked_by_one, asked_by_other = one.jobs(), other.jobs()
    begun = [next(asked_by_one)[0], next(asked_by_other)[0], next(asked_by_one)[0]]
    assert begun == [0, 1, 2]
    again = search(tmp_path / "one", 5, **shared)
    assert [number for number, _ in again.jobs()] == [0, 2, 3, 4]
    assert list(asked_by_other) == []
    other.tell(1, 0.5)
    again.tell(1, 7.0)
    assert other.study.trials[1].value == 0.5


class Jobs:
    """A launcher that runs nothing: a job reaches its number. It is handed the jobs in batches, or one by one."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def launch(self, job_overrides: list, initial_job_idx: int) -> list[JobReturn]:
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        self.numbers += numbers
        return [JobReturn(_return_value=float(number), status=JobStatus.COMPLETED) for number in numbers]


class OneByOne(Jobs):
    def launch_each(self, jobs: Iterable, ended: Callable) -> None:
        for number, overrides in jobs:
            ended(number, self.launch([overrides], number)[0])


@pytest.mark.parametrize("launcher", [Jobs(), OneByOne()], ids=["batches", "one by one"])
def test_a_config_that_does_not_compose_is_a_failed_job(
    launcher: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(train.PLUGINS)
    from hydra_plugins.recipes_sweep.search import OptunaSweeper

    with initialize_config_dir(str(CONF), **targets.VERSION_BASE):
        loader = GlobalHydra.instance().config_loader()
        given = [f"hydra.sweep.dir={tmp_path}", "hydra/sweeper=optuna"]
        master = loader.load_configuration("config", given, RunMode.MULTIRUN)
        sweeper = OptunaSweeper(8, 2, None, "RandomSampler", OmegaConf.create({"seed": 0}), None, None, None)
        sweeper.context, sweeper.master, sweeper.launcher = HydraContext(loader, Callbacks()), master, launcher
        sweeper.sweep(["optimizer=adamw,nothing_like_it"])

    results = {job.name: job for job in SweptJobs.read([tmp_path]).all}
    assert 0 < len(results) < 8
    assert sorted([*launcher.numbers, *map(int, results)]) == list(range(8))
    assert {job.state for job in results.values()} == {"failed"}
    assert all("nothing_like_it" in str(job.error) for job in results.values())
    assert "best_value" in (tmp_path / "optimization_results.yaml").read_text()


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
