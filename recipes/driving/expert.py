"""The driver that is imitated: it plans on what it foresees of the traffic."""

from __future__ import annotations

import itertools
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.driving.highway import FASTER, IDLE, LANE_WIDTH, LEFT, RIGHT, SLOWER, Array

if TYPE_CHECKING:
    from highway_env.envs.common.abstract import AbstractEnv

HORIZON = 3
"""Seconds that it plans ahead."""
TIME_STEP = 0.2
"""Of what it foresees, in seconds; the simulation's own."""
TIME_CONSTANT = 0.6
"""Of a vehicle's speed and lane towards those that it aims at, in seconds: TAU_ACC and TAU_LATERAL of highway-env."""
VEHICLE_LENGTH, VEHICLE_WIDTH = 5.0, 2.0

COST_OF_COLLISION = 10.0
COST_OF_CLOSENESS = 4.0
"""A second, at most."""
COST_OF_ACTION = 0.02
"""Of each that is not to idle, so that it does nothing without a reason."""
HEADWAY, HEADWAY_BEHIND = 0.4, 0.2
"""That it likes to have to those in front, and to leave to those behind, in seconds."""
BRAKING = 4.0
"""That it counts on, in metres a second squared."""


def expert_action(environment: AbstractEnv) -> int:
    """The first action of the best plan: of all sequences of actions for the next seconds, the one with the most reward
    as highway-env has it (speed, and the lane to the right), less the cost of collisions and of being too close.

    Others are foreseen to keep their speed and to end in the lane that they aim at. That is more than a driver sees.

    Args:
        environment: of :class:`~recipes.driving.highway.Highway`; it is left as it is.
    """
    plans = _plans()
    return int(plans[np.argmax(_values(environment, plans)), 0])


@cache
def _plans() -> Array:
    """All sequences of actions, ``(count, HORIZON)``; among equals the first is taken."""
    return np.array(list(itertools.product([IDLE, FASTER, RIGHT, LEFT, SLOWER], repeat=HORIZON)))


def _values(environment: AbstractEnv, plans: Array) -> Array:
    ego, config = environment.vehicle, environment.config
    speeds = np.asarray(ego.target_speeds, float)
    num_lanes = len(environment.road.network.all_side_lanes(ego.lane_index))
    others = _Others(environment)
    slow, fast = config["reward_speed_range"]
    x, y, speed = (
        np.zeros(len(plans)),
        np.full(len(plans), float(ego.position[1])),
        np.full(len(plans), float(ego.speed)),
    )
    aim, lane = np.full(len(plans), float(ego.target_speed)), np.full(len(plans), int(ego.target_lane_index[2]))
    value, crashed = np.zeros(len(plans)), np.zeros(len(plans), bool)
    for second, actions in enumerate(plans.T):
        # as MDPVehicle: the next of its speeds from the one that it has
        nearest = np.abs(speed[:, None] - speeds).argmin(1)
        aim = np.where(actions == FASTER, speeds[np.minimum(nearest + 1, len(speeds) - 1)], aim)
        aim = np.where(actions == SLOWER, speeds[np.maximum(nearest - 1, 0)], aim)
        lane = np.clip(lane + (actions == RIGHT) - (actions == LEFT), 0, num_lanes - 1)
        for step in range(round(1 / TIME_STEP)):
            speed = speed + (aim - speed) * (TIME_STEP / TIME_CONSTANT)
            x, y = x + speed * TIME_STEP, y + (LANE_WIDTH * lane - y) * (0.8 * TIME_STEP / TIME_CONSTANT)
            hit, closeness = others.near(second + (step + 1) * TIME_STEP, x, y, speed)
            crashed |= hit
            value -= COST_OF_CLOSENESS * TIME_STEP * closeness
        reward = config["high_speed_reward"] * np.clip((speed - slow) / (fast - slow), 0, 1)
        reward += config["right_lane_reward"] * lane / max(num_lanes - 1, 1)
        # half a point for each second that it is on the road
        value += np.where(crashed, -COST_OF_COLLISION / HORIZON, reward + 0.5)
        value -= COST_OF_ACTION * 0.9**second * (actions != IDLE)
    return value


class _Others:
    """The traffic around, as it is foreseen."""

    def __init__(self, environment: AbstractEnv) -> None:
        ego = environment.vehicle
        ahead = [(v, v.position[0] - ego.position[0]) for v in environment.road.vehicles if v is not ego]
        near: list[Any] = [(v, distance) for v, distance in ahead if -60 < distance < 120]
        self.x = np.array([distance for _, distance in near])
        self.y = np.array([v.position[1] for v, _ in near])
        self.aim = np.array([LANE_WIDTH * v.target_lane_index[2] for v, _ in near])
        self.speed = np.array([v.velocity[0] for v, _ in near])

    def near(self, time: float, x: Array, y: Array, speed: Array) -> tuple[Array, Array]:
        """Whether one is hit at ``x`` and ``y``, both ``(count,)``, and how much too close it is, from 0 to 1."""
        if not len(self.x):
            return np.zeros(len(x), bool), np.zeros(len(x))
        along = self.x + self.speed * time - x[:, None]
        across = np.abs(self.aim + (self.y - self.aim) * np.exp(-time / TIME_CONSTANT) - y[:, None])
        hit = (across < VEHICLE_WIDTH + 0.2) & (np.abs(along) < VEHICLE_LENGTH + 0.5)
        closing = speed[:, None] - self.speed
        in_front = 2 + HEADWAY * speed[:, None] + np.maximum(closing, 0) ** 2 / (2 * BRAKING)
        behind = 2 + HEADWAY_BEHIND * self.speed + np.maximum(-closing, 0) ** 2 / (2 * BRAKING)
        lacking = 1 - (np.abs(along) - VEHICLE_LENGTH) / np.where(along > 0, in_front, behind)
        closeness = np.where(across < VEHICLE_WIDTH + 0.6, np.clip(lacking, 0, 1) ** 2, 0)
        return hit.any(1), closeness.max(1)
