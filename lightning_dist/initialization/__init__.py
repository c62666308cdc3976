"""Initialisation of models that fit no process: recorded while building on meta, replayed value by value.

- ``tape``: what a recording is made of, and the generators meanwhile;
- ``recording``: the modes that write it while a model is built;
- ``replay``: which steps are needed, in which order values come to life and go;
- ``install``: the values go into the (by then perhaps sharded) module.
"""

from lightning_dist.initialization.install import RecordedInit, keep_shard
from lightning_dist.initialization.recording import record_initialization
from lightning_dist.initialization.tape import CannotDefer

__all__ = ["CannotDefer", "RecordedInit", "keep_shard", "record_initialization"]
