"""The driving recipe: what is recorded of an expert, what a driver sees, and drives that are scored in closed loop."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_dist import HybridStrategy

pytest.importorskip("highway_env")

from recipes.driving import DrivingData, EpisodeStrip, Highway, ImitationModule, OtherDrivers, SensorTransformer
from recipes.driving.data import SecondBySecond, Seconds
from recipes.driving.expert import expert_action
from recipes.driving.highway import FASTER, FIGURES, IDLE, RIGHT, SLOWER, Episode, Fleet
from tests.launch.commands import run as run_command
from tests.support.parity import QUIET
from tests.support.ranks import run_on_ranks

ROAD = Highway(num_vehicles=8, duration=5)
SEEDS: dict[str, Any] = {"train_seeds": [0, 3], "val_seeds": [100, 101], "test_seeds": [200, 205]}


def data(directory: Path, **changes: Any) -> DrivingData:
    """Five episodes to test on, of five seconds."""
    arguments = {**SEEDS, "noise": 0.3, "directory": directory, "num_processes": 1, "eval_batch_size": 3}
    return DrivingData(ROAD, **{**arguments, **changes})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the recording of :func:`data`."""
    directory = tmp_path_factory.mktemp("driving")
    data(directory).prepare_data()
    return directory


def arrays(directory: Path, **changes: Any) -> dict[str, Any]:
    with np.load(data(directory, **changes).recording.file(directory)) as file:
        return dict(file)


# ---------------------------------------------------------------- the road


def test_a_driver_sees_the_vehicles_that_are_there() -> None:
    episode = Episode(ROAD, seed=5)
    for action in (FASTER, IDLE, RIGHT):
        episode.step(action)
    ego, *others = sorted(
        episode.environment.road.vehicles,
        key=lambda v: np.linalg.norm(v.position - episode.environment.vehicle.position),
    )
    assert ego is episode.environment.vehicle
    seen = episode.observation
    assert seen.vehicles[0, 3] == pytest.approx(ego.velocity[0] / 40, abs=1e-5)
    for row, vehicle in zip(seen.vehicles[1:], others, strict=False):
        (x, y), (vx, vy) = vehicle.position - ego.position, vehicle.velocity - ego.velocity
        expected = [1, np.clip(x / 100, -1, 1), y / 12, vx / 40, vy / 10]
        np.testing.assert_allclose(row, expected, atol=1e-5)
    cells = set()
    for vehicle in [ego, *others]:
        x, y = vehicle.position - ego.position
        cell = int((x + ROAD.behind) // 4), int((y + 10) // 4)
        if 0 <= cell[0] < 31 and 0 <= cell[1] < 5:
            cells.add(cell)
    assert set(zip(*np.nonzero(seen.grid[0]), strict=True)) == cells
    assert seen.grid.shape == (4, *ROAD.grid_shape)


@pytest.mark.slow
def test_the_expert_drives_better_than_constant_drivers() -> None:
    policies = {"expert": expert_action, "idle": lambda _: IDLE, "slower": lambda _: SLOWER}
    found = {}
    for name, policy in policies.items():
        episodes = [Episode(Highway(), seed) for seed in range(400, 404)]
        for episode in episodes:
            while not episode.ended:
                episode.step(policy(episode.environment))
        found[name] = {figure: np.mean([episode.figures()[figure] for episode in episodes]) for figure in FIGURES}
    assert found["expert"]["collisions"] < found["idle"]["collisions"]
    assert found["expert"]["reward"] > found["idle"]["reward"] + 5
    assert found["expert"]["reward"] > found["slower"]["reward"] + 1
    assert found["expert"]["speed"] > found["slower"]["speed"] + 2


# ---------------------------------------------------------------- the recording


def test_an_episode_is_recorded_by_its_seed_alone(recorded: Path, tmp_path: Path) -> None:
    fewer = {"train_seeds": [1, 3]}
    data(tmp_path, **fewer).prepare_data()
    whole, part = arrays(recorded), arrays(tmp_path, **fewer)
    assert 0 < len(part["train_actions"]) < len(whole["train_actions"])
    for name in part:
        if not name.startswith("logistic"):  # it learns from them all
            np.testing.assert_array_equal(part[name], whole[name][-len(part[name]) :])


@pytest.mark.slow
def test_processes_record_what_one_does(recorded: Path, tmp_path: Path) -> None:
    data(tmp_path, num_processes=2).prepare_data()
    one, two = arrays(recorded), arrays(tmp_path)
    assert one.keys() == two.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(two[name], values)


def test_another_action_is_taken_than_the_experts_where_there_is_noise(recorded: Path, tmp_path: Path) -> None:
    data(tmp_path, noise=0.0).prepare_data()
    quiet, noisy = arrays(tmp_path, noise=0.0), arrays(recorded)
    np.testing.assert_array_equal(noisy["expert_figures"], quiet["expert_figures"])  # only what is learned from
    assert not np.array_equal(noisy["train_vehicles"], quiet["train_vehicles"])
    episode, actions = Episode(ROAD, 0), quiet["train_actions"]
    for second in range(ROAD.duration):
        np.testing.assert_array_equal(quiet["train_vehicles"][second], episode.observation.vehicles)
        np.testing.assert_array_equal(quiet["train_grid"][second], episode.observation.grid)
        episode.step(actions[second])


def test_the_experts_action_is_recorded_where_another_is_taken(tmp_path: Path) -> None:
    road, seeds = Highway(num_vehicles=8, duration=1), range(12)
    changes: Any = {"noise": 0.99, "train_seeds": [0, len(seeds)]}
    noisy = DrivingData(road, **{**SEEDS, **changes}, directory=tmp_path, num_processes=1)
    noisy.prepare_data()
    noisy.setup("fit")
    actions = [expert_action(Episode(road, seed).environment) for seed in seeds]
    assert noisy.parts["train"].actions.tolist() == actions  # type: ignore[attr-defined]


def test_constant_drivers_are_scored_as_by_hand(recorded: Path) -> None:
    for driver, action in (("idle", IDLE), ("slower", SLOWER)):
        for seed, figures in zip(range(200, 205), arrays(recorded)[f"{driver}_figures"], strict=True):
            assert figures == pytest.approx(list(_by_hand(seed, lambda _, a=action: a).values()))


def _by_hand(seed: int, policy: Any) -> dict[str, float]:
    environment = ROAD.make()
    environment.configure({"observation": ROAD.sensors()})
    seen, _ = environment.reset(seed=seed)
    rewards, speeds = [], []
    ended = False
    while not ended:
        seen, reward, crashed, late, info = environment.step(policy(seen))
        rewards.append(reward)
        speeds.append(info["speed"])
        ended = crashed or late
    return dict(zip(FIGURES, (sum(rewards), float(crashed), float(np.mean(speeds)), float(len(rewards))), strict=True))


def test_a_recording_is_made_once_and_whole(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = data(recorded).recording.file(recorded)
    before = file.stat().st_mtime_ns
    data(recorded).prepare_data()
    assert (file.stat().st_mtime_ns, list(recorded.iterdir())) == (before, [file])

    def is_interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.driving.recording._score", is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        data(tmp_path).prepare_data()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_seeds": [3, 3]}, r"data\.train_seeds=\[3, 3\] has no seed"),
        ({"val_seeds": [2, 9]}, r"data\.train_seeds=\[0, 3\] and data\.val_seeds=\[2, 9\] have seeds in common"),
        (
            {"test_seeds": [90, 300]},
            r"data\.val_seeds=\[100, 101\] and data\.test_seeds=\[90, 300\] have seeds in common",
        ),
        ({"train_seeds": [0, 1, 2]}, r"data\.train_seeds=\[0, 1, 2\] is no range"),
        ({"noise": 1.0}, r"data\.noise=1\.0 is no share"),
    ],
)
def test_what_a_config_says_wrongly_is_told(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        data(tmp_path, **changes)


def test_a_package_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'lightning_dist\[driving\]'"):
        data(tmp_path).prepare_data()


# ---------------------------------------------------------------- the closed loop


@pytest.mark.parametrize(("num_episodes", "batch_size", "num_ranks"), [(5, 3, 1), (5, 3, 2), (7, 2, 3), (4, 8, 4)])
def test_each_rank_has_all_seconds_of_its_episodes_in_order(num_episodes: int, batch_size: int, num_ranks: int) -> None:
    seconds = Seconds(range(num_episodes), 3)
    batches = list(SecondBySecond(seconds, batch_size, num_ranks))
    assert len(batches) % num_ranks == 0
    seen = []
    for rank in range(num_ranks):
        clocks: dict[int, list[int]] = {}
        for batch in batches[rank::num_ranks]:
            for one in (seconds[index] for index in batch):
                clocks.setdefault(int(one["seed"]), []).append(int(one["second"]))
        assert all(clock == [0, 1, 2] for clock in clocks.values())
        seen += clocks
    assert sorted(seen) == list(range(num_episodes))


def test_fewer_episodes_than_ranks_are_told() -> None:
    with pytest.raises(ValueError, match="2 episodes to test on can't be dealt to 4 data ranks"):
        SecondBySecond(Seconds(range(2), 3), 8, 4)


def test_seconds_that_went_to_another_rank_are_told() -> None:
    fleet = Fleet(ROAD)
    fleet.observe([200], 0)
    fleet.step([200], [IDLE])
    with pytest.raises(RuntimeError, match="second 2 of episode 200 came to a rank where it is at 1"):
        fleet.observe([200], 2)
    with pytest.raises(RuntimeError, match="second 1 of episode 201 came to a rank where it did not begin here"):
        fleet.observe([201], 1)


def driver() -> ImitationModule:
    """One that does this or that by what it sees, though it was not trained."""
    torch.manual_seed(3)
    made = ImitationModule(partial(SensorTransformer, ROAD, width=16, depth=2), partial(torch.optim.AdamW, lr=1e-3))
    made.configure_model()
    rows = torch.from_numpy(np.stack([Episode(ROAD, seed).observation.vehicles for seed in range(30, 60)]))
    grids = torch.from_numpy(np.stack([Episode(ROAD, seed).observation.grid for seed in range(30, 60)]))
    with torch.no_grad():
        made.network.tokens.vehicles.weight.mul_(20)  # type: ignore[union-attr, operator]
        logits = made.eval()(grids, rows)
        made.network.head.bias.sub_(logits.mean(0))  # type: ignore[union-attr, operator]
    return made


def _tested(directory: Path, layout: str | None, strip: Path | None = None) -> dict[str, float]:
    strategy: Any = "auto" if layout is None else HybridStrategy(layout)
    callbacks = [OtherDrivers(), *([] if strip is None else [EpisodeStrip(strip, every=2)])]
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    trainer = L.Trainer(**{**QUIET, "devices": devices}, strategy=strategy, callbacks=callbacks)
    (found,) = trainer.test(driver(), datamodule=data(directory), verbose=False)
    return {name: float(value) for name, value in found.items()}


@pytest.fixture(scope="module")
def by_hand(recorded: Path) -> dict[str, float]:
    """The mean figures of episodes that the network drives one by one, without Lightning."""
    network, taken = driver().eval(), []

    def policy(seen: Any) -> int:
        grid, vehicles = (torch.from_numpy(one)[None] for one in seen)
        with torch.no_grad():
            taken.append(int(network(grid, vehicles).argmax()))
        return taken[-1]

    found = [_by_hand(seed, policy) for seed in range(200, 205)]
    assert len(set(taken)) > 2
    assert 0 < sum(figures["collisions"] for figures in found) < 5
    return {f"test/{name}": float(np.mean([figures[name] for figures in found])) for name in FIGURES}


def test_drives_are_scored_as_by_hand_and_pictured(recorded: Path, by_hand: dict[str, float], tmp_path: Path) -> None:
    found = _tested(recorded, None, tmp_path)
    assert {name: found[name] for name in by_hand} == pytest.approx(by_hand, rel=1e-5)
    figures = arrays(recorded)["expert_figures"].mean(0)
    assert [found[f"test/expert/{name}"] for name in FIGURES] == pytest.approx(figures, rel=1e-5)
    with Image.open(tmp_path / "episode_200.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[1] == 2 * 600 + 3 * 10
    assert len(np.unique(pixels[40:100, 20:600].reshape(-1, 3), axis=0)) > 3  # road, marks, and vehicles


@pytest.mark.sampled
@pytest.mark.parametrize(("layout", "num_ranks"), [("dp_replicate=2", 2), ("dp_shard=2", 2), ("tp=2", 2), ("pp=2", 2)])
def test_drives_have_the_same_figures_under_every_layout(
    layout: str, num_ranks: int, recorded: Path, by_hand: dict[str, float]
) -> None:
    for found in run_on_ranks(num_ranks, _tested, recorded, layout):
        assert {name: found[name] for name in by_hand} == pytest.approx(by_hand, rel=1e-5)


def test_a_network_learns_what_the_expert_does(recorded: Path) -> None:
    torch.manual_seed(0)
    learner = ImitationModule(partial(SensorTransformer, ROAD, width=32), partial(torch.optim.AdamW, lr=1e-3))
    trainer = L.Trainer(**{**QUIET, "max_epochs": 120})
    episodes = data(recorded, batch_size=15)
    trainer.fit(learner, datamodule=episodes)
    assert float(trainer.callback_metrics["train/loss"]) < 0.5
    predicted = torch.cat(trainer.predict(learner, datamodule=episodes))  # type: ignore[arg-type]
    torch.testing.assert_close(predicted.sum(-1), torch.ones(len(arrays(recorded)["val_actions"])))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp_replicate=2", "pp=2"])
def test_ranks_record_train_and_drive(layout: str, tmp_path: Path) -> None:
    """The experiment, made small: the first rank records in processes of its own while the other waits."""
    few = ["data.train_seeds=[0,4]", "data.val_seeds=[100,101]", "data.test_seeds=[200,204]", "data.highway.duration=5"]
    arguments = [
        "experiment=highway_imitation",
        *few,
        *("data.batch_size=4", "data.eval_batch_size=2", "data.num_processes=2", f"data.directory={tmp_path}/recorded"),
        *("trainer.max_epochs=1", "trainer.devices=2", "trainer.accelerator=cpu", f"strategy.layout='{layout}'"),
        f"hydra.run.dir={tmp_path}/run",
    ]
    done = run_command([sys.executable, "-m", "recipes.train", *arguments])
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert 0 < metrics["test/reward"] <= 5
    assert (tmp_path / "run" / "episode_200.png").is_file()
    assert len(list((tmp_path / "recorded").iterdir())) == 1


def test_a_test_without_episodes_is_told() -> None:
    from recipes.driving.module import driven_by

    with pytest.raises(TypeError, match=r"pass trainer\.test\(module, datamodule=DrivingData"):
        driven_by(L.Trainer(**QUIET))
