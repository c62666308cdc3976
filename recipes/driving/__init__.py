"""Driving: imitation of an expert on a highway, scored in closed loop."""

from recipes.driving.data import DrivingData
from recipes.driving.highway import Highway
from recipes.driving.module import ImitationModule
from recipes.driving.networks import SensorTransformer
from recipes.driving.other_drivers import OtherDrivers
from recipes.driving.strip import EpisodeStrip

__all__ = ["DrivingData", "EpisodeStrip", "Highway", "ImitationModule", "OtherDrivers", "SensorTransformer"]
