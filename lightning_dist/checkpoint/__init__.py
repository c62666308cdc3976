"""Checkpoints that fit every layout: save, load and convert, with or without a process group.

The state of a run is one dictionary, Lightning's own (``Trainer`` makes it), in which a parameter is still what the
layout made of it, a plain tensor or a ``DTensor``, and optimizer states go by the parameter's name: :func:`model_state`
and :func:`optimizer_state_by_name` take it from a module and its optimizers, :func:`load_model_state` and
:func:`load_optimizer_state` put it back. :func:`save` writes it, as Lightning's single file or as a directory of
shards, :func:`load` reads either, under any layout, and the weights of others, :func:`convert` writes one from another.

Paths are local, or URLs that fsspec knows. Errors that one rank meets are raised on all of them.
"""

from lightning_dist.checkpoint.background import BackgroundSaves
from lightning_dist.checkpoint.convert import convert
from lightning_dist.checkpoint.locations import DamagedCheckpoint, as_path
from lightning_dist.checkpoint.locations import remove_checkpoint as remove
from lightning_dist.checkpoint.module_state import load_model_state, model_state, parameter_names
from lightning_dist.checkpoint.optimizer_state import load_optimizer_state, optimizer_state_by_name
from lightning_dist.checkpoint.save_load import holds_no_run, is_sharded, load, save
from lightning_dist.checkpoint.single_file import StageRanks, gather_state
from lightning_dist.dtensors import full

__all__ = ["BackgroundSaves", "DamagedCheckpoint", "StageRanks", "holds_no_run", "is_sharded", "load", "remove", "save"]
__all__ += ["as_path", "convert", "full", "gather_state", "load_model_state", "load_optimizer_state", "model_state"]
__all__ += ["optimizer_state_by_name", "parameter_names"]
