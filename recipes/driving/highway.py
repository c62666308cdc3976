"""The road of `highway-env`, what a driver sees of it, and an episode on it with its figures."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # the recipes are imported without highway-env
    from highway_env.envs.common.abstract import AbstractEnv

Array = np.ndarray[Any, Any]

ACTIONS = ("lane left", "idle", "lane right", "faster", "slower")
"""The meta-actions of highway-env, by their numbers; a driver chooses one a second."""
LEFT, IDLE, RIGHT, FASTER, SLOWER = range(len(ACTIONS))

VEHICLE_FEATURES = ("presence", "x", "y", "vx", "vy")
GRID_FEATURES = ("presence", "vx", "vy", "on_road")
LANE_WIDTH = 4.0
"""In metres; a cell of the grid has a lane's width, with the driver's own lane in its middle."""


@dataclass(frozen=True)
class Observation:
    """What a driver sees at a second.

    Args:
        grid: the occupancy grid around its vehicle, ``(4, length, width)``: whether a vehicle is there, its speed
            relative to the driver's along and across the road, and whether there is road; within -1 to 1.
        vehicles: the kinematics of its own vehicle and of the nearest others, ``(num_seen, 5)``: presence, position and
            velocity along and across the road, of the others relative to it; within -1 to 1, zero where there are none.
    """

    grid: Array
    vehicles: Array


@dataclass(frozen=True)
class Highway:
    """A straight road with traffic that drives by the models IDM and MOBIL, ``highway-fast-v0`` of highway-env
    (E. Leurent 2018, https://github.com/Farama-Foundation/HighwayEnv), as a config describes it.

    Args:
        num_vehicles: in the traffic.
        num_lanes: of the road.
        duration: of an episode without a collision, in seconds.
        num_seen: vehicles that the driver sees, its own included.
        ahead, behind: how far the occupancy grid reaches, in metres.
    """

    num_vehicles: int = 12
    num_lanes: int = 3
    duration: int = 30
    num_seen: int = 8
    ahead: float = 82.0
    behind: float = 42.0

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Cells of the occupancy grid along the road and across it."""
        return int((self.ahead + self.behind) // LANE_WIDTH), 2 * self.num_lanes - 1

    def check_installed(self) -> None:
        """Raises an ImportError if highway-env is not installed."""
        if importlib.util.find_spec("highway_env") is None:
            raise ImportError("recipe=driving needs highway-env; pip install 'lightning_dist[driving]'")

    def make(self) -> AbstractEnv:
        """An environment; :class:`Episode` gives it a seed. It observes nothing by itself: sensors take as long as the
        traffic, and most drivers that are scored need none.

        Raises:
            ImportError: highway-env is not installed.
        """
        self.check_installed()
        import gymnasium
        import highway_env  # noqa: F401  registers its environments

        config = {
            "observation": _tuple_of(),
            "vehicles_count": self.num_vehicles,
            "lanes_count": self.num_lanes,
            "duration": self.duration,
        }
        # unchecked: the check refuses an environment that observes nothing
        made: Any = gymnasium.make("highway-fast-v0", config=config, disable_env_checker=True)
        return made.unwrapped

    def sensors(self) -> dict[str, Any]:
        """The observation of an environment, as its config has it: the grid and the vehicles, side by side."""
        width, side = LANE_WIDTH * self.num_lanes, LANE_WIDTH * (self.num_lanes - 0.5)
        grid = {
            "type": "OccupancyGrid",
            "features": list(GRID_FEATURES),
            "grid_size": [[-self.behind, self.ahead], [-side, side]],
            "grid_step": [LANE_WIDTH, LANE_WIDTH],
            "features_range": {"vx": [-20, 20], "vy": [-10, 10]},
        }
        vehicles = {
            "type": "Kinematics",
            "features": list(VEHICLE_FEATURES),
            "vehicles_count": self.num_seen,
            # the driver's own speed is absolute, so the range has to have room for it
            "features_range": {"x": [-100, 100], "y": [-width, width], "vx": [-40, 40], "vy": [-10, 10]},
            "see_behind": True,
        }
        return _tuple_of(grid, vehicles)


def _tuple_of(*observations: dict[str, Any]) -> dict[str, Any]:
    return {"type": "TupleObservation", "observation_configs": list(observations)}


FIGURES = ("reward", "collisions", "speed", "length")
"""Of an episode: the sum of highway-env's rewards (each within 0 and 1), 1 for a collision else 0, the mean speed in
metres a second, and the seconds until its end."""


class Episode:
    """A drive from a seed to a collision or the end of its time.

    Args:
        highway: on which.
        seed: of the traffic.
    """

    def __init__(self, highway: Highway, seed: int) -> None:
        self.environment = highway.make()
        from highway_env.envs.common.observation import observation_factory

        self.environment.reset(seed=seed)
        self._sensors = observation_factory(self.environment, highway.sensors())
        self._observation: Observation | None = None
        self.ended = False
        self.second = 0
        """Of its clock, which goes on when the drive has ended."""
        self._rewards: list[float] = []
        self._speeds: list[float] = []

    @property
    def observation(self) -> Observation:
        """What the driver sees now."""
        if self._observation is None:
            self._observation = Observation(*self._sensors.observe())
        return self._observation

    def step(self, action: int) -> None:
        """A second with an action; nothing but the clock moves once the drive has ended."""
        self.second += 1
        if self.ended:
            return
        _, reward, crashed, is_late, info = self.environment.step(int(action))
        self._observation = None
        self._rewards.append(float(reward))
        self._speeds.append(float(info["speed"]))
        self.ended = crashed or is_late

    def figures(self) -> dict[str, float]:
        """Of the drive so far, by the names of :data:`FIGURES`."""
        crashed = float(self.environment.vehicle.crashed)
        speed = float(np.mean(self._speeds)) if self._speeds else 0.0
        values = sum(self._rewards), crashed, speed, float(len(self._rewards))
        return dict(zip(FIGURES, values, strict=True))


class Fleet:
    """Episodes that are driven at once, each for the same number of seconds, whatever becomes of it: networks whose
    parameters are gathered in each forward pass need as many passes on every rank.

    Args:
        highway: on which.
    """

    def __init__(self, highway: Highway) -> None:
        self.highway = highway
        self.episodes: dict[int, Episode] = {}
        """By their seeds."""

    def observe(self, seeds: Sequence[int], second: int) -> list[Observation]:
        """What the drivers of these episodes see, which begin at second 0.

        Raises:
            RuntimeError: an episode is at another second: not all of them came to this rank, one after the other.
        """
        if second == 0:
            self.episodes |= {seed: Episode(self.highway, seed) for seed in seeds}
        for seed in seeds:
            if seed not in self.episodes or self.episodes[seed].second != second:
                at = f"is at {self.episodes[seed].second}" if seed in self.episodes else "did not begin here"
                raise RuntimeError(
                    f"second {second} of episode {seed} came to a rank where it {at}; each data rank has to get all "
                    "seconds of its episodes in order, as DrivingData's own loader deals them under strategy=hybrid"
                )
        return [self.episodes[seed].observation for seed in seeds]

    def step(self, seeds: Sequence[int], actions: Sequence[int]) -> list[dict[str, float]]:
        """A second of these episodes; the figures of all of them if it was the last, else none."""
        for seed, action in zip(seeds, actions, strict=True):
            self.episodes[seed].step(action)
        if self.episodes[seeds[0]].second < self.highway.duration:
            return []
        return [self.episodes.pop(seed).figures() for seed in seeds]
