"""Initialisation of models that fit no process: recorded while building on meta, replayed value by value."""

from lightning_dist.initialization.install import RecordedInit, keep_shard
from lightning_dist.initialization.recording import record_initialization
from lightning_dist.initialization.tape import CannotDefer

__all__ = ["CannotDefer", "RecordedInit", "keep_shard", "record_initialization"]
