"""Records what the expert does, and scores it and simpler drivers, in processes of its own, once, into a file."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from recipes.driving.expert import expert_action
from recipes.driving.highway import ACTIONS, FIGURES, IDLE, SLOWER, Array, Episode, Highway

FORM = 1
"""Of the file; one of another form is recorded anew."""

Policy = Callable[[Episode], int]


@dataclass(frozen=True)
class Recording:
    """What is recorded; all of it is in the name of the file.

    Args:
        highway: on which.
        train_seeds, val_seeds: begin and end of the range of seeds whose episodes the expert is recorded in.
        test_seeds: of those that drivers are scored in.
        noise: the share of seconds in which any action is taken, and the expert's recorded all the same: so there are
            examples of how it leaves situations that it doesn't come into by itself (https://arxiv.org/abs/1703.09327).

    Raises:
        ValueError: a range is empty, or two have a seed in common.
    """

    highway: Highway
    train_seeds: tuple[int, int]
    val_seeds: tuple[int, int]
    test_seeds: tuple[int, int]
    noise: float = 0.0

    def __post_init__(self) -> None:
        ranges = {name: getattr(self, name) for name in ("train_seeds", "val_seeds", "test_seeds")}
        for name, (begin, end) in ranges.items():
            if begin >= end:
                raise ValueError(
                    f"data.{name}=[{begin}, {end}] has no seed; pass its first one, and the one after its last"
                )
        for (name, first), (other, second) in itertools.combinations(ranges.items(), 2):
            if max(first[0], second[0]) < min(first[1], second[1]):
                raise ValueError(
                    f"data.{name}={list(first)} and data.{other}={list(second)} have seeds in common, so that episodes "
                    "would not be unseen; pass ranges apart"
                )
        if not 0 <= self.noise < 1:
            raise ValueError(f"data.noise={self.noise} is no share of seconds; pass a number from 0 to below 1")

    def file(self, directory: Path) -> Path:
        """Where it lies, by what is recorded, and by which highway-env."""
        told = {**asdict(self), "form": FORM, "highway-env": metadata.version("highway-env")}
        return directory / f"highway-{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]}.npz"


def record(recording: Recording, file: Path, num_processes: int) -> None:
    """Records, and writes the file at once when all is there.

    Its arrays are ``{part}_grid``, ``{part}_vehicles`` and ``{part}_actions`` of the parts ``train`` and ``val``, the
    seconds of all episodes one after the other, and ``{driver}_figures`` ``(episodes, 4)``, in the order of
    :data:`~recipes.driving.highway.FIGURES`, of the drivers ``expert``, ``idle``, ``slower`` and
    ``logistic_regression`` on the seeds to test on. Each episode depends on its seed alone.

    Args:
        recording: what.
        file: where.
        num_processes: among which the episodes are dealt; 1 stays in this one.
    """
    test, highway = range(*recording.test_seeds), recording.highway
    parts = {"train": range(*recording.train_seeds), "val": range(*recording.val_seeds)}
    fixed: dict[str, Policy] = {"expert": _expert, "idle": partial(_always, IDLE), "slower": partial(_always, SLOWER)}
    num_episodes = sum(map(len, parts.values())) + (len(fixed) + 1) * len(test)
    arrays: dict[str, Array] = {}
    with _Workers(num_processes, num_episodes) as workers:
        for part, seeds in parts.items():
            episodes = workers.run([partial(_watch, highway, recording.noise, seed) for seed in seeds])
            for name, of_episodes in zip(("grid", "vehicles", "actions"), zip(*episodes, strict=True), strict=True):
                arrays[f"{part}_{name}"] = np.concatenate(of_episodes)
        learned = partial(_predicted, _logistic_regression(arrays["train_vehicles"], arrays["train_actions"]))
        drivers: dict[str, Policy] = {**fixed, "logistic_regression": learned}
        for driver, policy in drivers.items():
            figures = workers.run([partial(_score, highway, policy, seed) for seed in test])
            arrays[f"{driver}_figures"] = np.array(figures)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.part")
    with unfinished.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    unfinished.replace(file)


class _Workers:
    """Processes that drive, and a bar of how many episodes are done."""

    def __init__(self, num_processes: int, num_episodes: int) -> None:
        # spawned: this process may have threads, of torch and of collectives, that a fork would not survive
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(num_processes, context) if num_processes > 1 else None
        console = Console(stderr=True)
        columns = TextColumn("episodes recorded"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())
        self._task = self._progress.add_task("", total=num_episodes)

    def __enter__(self) -> _Workers:
        self._progress.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._progress.stop()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[Callable[[], Any]]) -> list[Any]:
        """What the jobs return, in their order."""
        return [result for _, result in sorted(self._done(jobs), key=lambda done: done[0])]

    def _done(self, jobs: Sequence[Callable[[], Any]]) -> Iterator[tuple[int, Any]]:
        if self._pool is None:
            ended: Iterator[tuple[int, Any]] = ((index, job()) for index, job in enumerate(jobs))
        else:
            futures = {self._pool.submit(job): index for index, job in enumerate(jobs)}
            ended = ((futures[future], future.result()) for future in as_completed(futures))
        for done in ended:
            self._progress.advance(self._task)
            yield done


def _watch(highway: Highway, noise: float, seed: int) -> tuple[Array, Array, Array]:
    """Of an episode: grids, vehicles, and the actions that the expert takes there."""
    episode, draw = Episode(highway, seed), np.random.default_rng(seed)
    seconds: list[tuple[Array, Array, int]] = []
    while not episode.ended:
        action, seen = _expert(episode), episode.observation
        seconds.append((seen.grid, seen.vehicles, action))
        episode.step(int(draw.integers(len(ACTIONS))) if draw.random() < noise else action)
    grids, vehicles, actions = zip(*seconds, strict=True)
    return np.stack(grids), np.stack(vehicles), np.array(actions)


def _score(highway: Highway, policy: Policy, seed: int) -> list[float]:
    """The figures of an episode that a policy drives."""
    episode = Episode(highway, seed)
    while not episode.ended:
        episode.step(policy(episode))
    figures = episode.figures()
    return [figures[name] for name in FIGURES]


def _expert(episode: Episode) -> int:
    return expert_action(episode.environment)


def _always(action: int, episode: Episode) -> int:
    return action


def _predicted(model: Any, episode: Episode) -> int:
    return int(model.predict(episode.observation.vehicles.reshape(1, -1))[0])


def _logistic_regression(vehicles: Array, actions: Array) -> Any:
    """scikit-learn's, of the kinematics of a second."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(
        vehicles.reshape(len(vehicles), -1), actions
    )
