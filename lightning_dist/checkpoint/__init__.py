"""Checkpoints that fit every layout: save, load and convert, with or without a process group.

The state of a run is one dictionary, Lightning's own (``Trainer`` makes it), in which a parameter is still
what the layout made of it, a plain tensor or a ``DTensor``, and optimizer states go by the parameter's name:

- :func:`model_state` and :func:`optimizer_state_by_name` (with :func:`parameter_names`) take it from a module and its
  optimizers,
- :func:`save` writes it, as Lightning's single file or as a directory of shards,
- :func:`load` reads either, under any layout, and the weights of others,
- :func:`load_model_state` and :func:`load_optimizer_state` put it into a module and its optimizers,
- :func:`convert` writes one format from another, in one process.

Paths are local, or URLs that fsspec knows. Errors that one rank meets are raised on all of them.
"""

from lightning_dist.checkpoint.background import BackgroundSaves
from lightning_dist.checkpoint.convert import convert
from lightning_dist.checkpoint.formats import DamagedCheckpoint
from lightning_dist.checkpoint.locations import as_path
from lightning_dist.checkpoint.module_state import load_model_state, model_state, parameter_names
from lightning_dist.checkpoint.optimizer_state import load_optimizer_state, optimizer_state_by_name
from lightning_dist.checkpoint.save_load import holds_no_run, is_sharded, load, remove, save
from lightning_dist.checkpoint.single_file import gather_state
from lightning_dist.checkpoint.stages import StageRanks
from lightning_dist.dtensors import full

__all__ = [
    "BackgroundSaves",
    "DamagedCheckpoint",
    "StageRanks",
    "as_path",
    "convert",
    "full",
    "gather_state",
    "holds_no_run",
    "is_sharded",
    "load",
    "load_model_state",
    "load_optimizer_state",
    "model_state",
    "optimizer_state_by_name",
    "parameter_names",
    "remove",
    "save",
]
