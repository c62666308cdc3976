"""The checkpoints of a run: state dicts of whole tensors, files that fit every layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_dist import checkpoint as checkpoints
from lightning_dist.checkpoint import StageRanks
from lightning_dist.checkpoint.background import BackgroundSaves
from lightning_dist.checkpoint.lazy_tensors import OnDisk
from lightning_dist.checkpoint.module_state import LateLoads
from lightning_dist.collectives import broadcast_object, raise_on_all_ranks
from lightning_dist.compat import lightning as private
from lightning_dist.plans.pretrained import DESCRIPTIONS, descriptions
from lightning_dist.ranks import LayoutRanks
from lightning_dist.trainer.callback_saves import CallbackSaves
from lightning_dist.trainer.restart import Restart
from lightning_dist.trainer.resume import Resume

Format = Literal["auto", "single", "sharded"]


@dataclass
class CheckpointOptions:
    """What a user says of checkpoints, see ``HybridStrategy``; what is changed later holds for the next one."""

    format: Format = "auto"
    in_background: bool = False
    pretrained: private.Path | None = None


class Checkpoints:
    """Saves and loads the checkpoints of a run, in files that fit every layout.

    ``names_of_parts`` gives those of parameters that optimizers hold parts of when the module is whole again.
    """

    def __init__(
        self,
        ranks: LayoutRanks,
        resume: Resume,
        restart: Restart,
        options: CheckpointOptions,
        names_of_parts: Callable[[], Mapping[Tensor, str]] = dict,
    ) -> None:
        self.options, self.saves = options, BackgroundSaves()
        self.callback_saves = CallbackSaves(ranks, self.saves)
        self._ranks, self._resume, self._restart, self._names_of_parts = ranks, resume, restart, names_of_parts
        self._trainer: Any = None
        self._io: CheckpointIO = TorchCheckpointIO()
        self._begun = WeakSet[pl.LightningModule]()
        """Modules that were given the weights that a fit begins from."""
        self._source: private.Path | None = None
        """What was loaded last."""
        self._late_loads: LateLoads | None = None
        self._is_set_up = False
        """Whether the module has been set up in this run."""

    def attach(self, trainer: pl.Trainer, io: CheckpointIO) -> None:
        """A run begins; an ``io`` of the user's own writes, reads and removes single files.

        Raises:
            OSError: the weights to begin from are not there.
            ValueError: options that don't go together.
        """
        self._trainer, self._io, self._is_set_up = trainer, io, False
        if self.options.pretrained is not None:
            # what is not there is refused before processes talk
            checkpoints.is_sharded(self.options.pretrained)
        links = (getattr(callback, "save_last", None) == "link" for callback in trainer.checkpoint_callbacks)
        if self.options.in_background and any(links):
            raise ValueError(
                'async_save=True with ModelCheckpoint(save_last="link"): the link would be there before what it points '
                "to; choose save_last=True, or saves that the training waits for"
            )
        if self.options.format == "sharded" and self._has_own_io:
            raise ValueError(
                f'checkpoint_format="sharded" with a {type(io).__name__}: every rank writes its part of a directory, '
                'and a CheckpointIO writes the whole from one; choose checkpoint_format="single", or leave the plugin '
                "out (async_save=True writes in the background)"
            )

    @property
    def _module(self) -> pl.LightningModule:
        return self._trainer.lightning_module

    @property
    def _has_own_io(self) -> bool:
        """Whether the user brought what writes, reads and removes checkpoints."""
        return type(self._io) is not TorchCheckpointIO

    @property
    def are_sharded(self) -> bool:
        """Whether a checkpoint is a directory to which every rank writes what it holds."""
        if self.options.format == "auto":
            # not in the process that started others, which has whole weights
            return self._ranks.holds_shards and not self._has_own_io and dist.is_initialized()
        return self.options.format == "sharded"

    def model_state(self, module: pl.LightningModule) -> dict[str, Any]:
        """The module's state dict as of the last optimizer step; what ranks hold parts of, as parts."""
        return self._resume.buffers_at_step(checkpoints.model_state(module))

    def whole_model_state(self, module: pl.LightningModule) -> dict[str, Any]:
        """The module's state dict, whole, on rank 0."""
        return checkpoints.gather_state(checkpoints.model_state(module), stage_ranks(self._ranks))

    def optimizer_state(self, module: pl.LightningModule, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state by the names of parameters.

        As in Lightning's strategies, one that deals its states to the ranks (``ZeroRedundancyOptimizer``) gathers them
        to rank 0, over its own group.
        """
        if hasattr(optimizer, "consolidate_state_dict"):
            optimizer.consolidate_state_dict()
            if self._ranks.rank:
                return {}
        names = {**self._names_of_parts(), **checkpoints.parameter_names(module)}
        return checkpoints.optimizer_state_by_name(optimizer, names)

    def save(
        self, module: pl.LightningModule, checkpoint: dict[str, Any], path: private.Path, storage_options: Any = None
    ) -> None:
        """Every rank calls it. See :func:`lightning_dist.checkpoint.save` for what is communicated.

        In the background, it returns when the state has been copied to host memory; the next save, the end of the run,
        an exception and a signal wait for the one in flight, and raise what it met. A callback's that the store refuses
        is tried again, see :class:`CallbackSaves`.
        """
        checkpoint = self._resume.added_to(checkpoint)
        if described := descriptions(module):
            checkpoint[DESCRIPTIONS] = described
        if storage_options is not None and not self._has_own_io:
            raise TypeError(
                "Trainer.save_checkpoint(..., storage_options=...) needs a CheckpointIO that knows what to do with "
                "them: pass one to the Trainer's plugins"
            )
        self.callback_saves.settle()
        with self.callback_saves.refusals(path):
            checkpoints.save(
                checkpoint,
                path,
                sharded=self.are_sharded,
                write=partial(self._write, path, storage_options) if self._has_own_io else None,
                stages=stage_ranks(self._ranks),
                background=self.saves if self.options.in_background else None,
                then=self._restart.recorder(path, checkpoint),
            )

    def _write(self, path: private.Path, storage_options: Any | None, checkpoint: dict[str, Any], _: Path) -> None:
        self._io.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def remove(self, path: private.Path) -> None:
        """Removes a checkpoint, after saves in flight; rank 0 does."""
        if self._ranks.rank == 0:
            remove: Callable[[Any], None] = checkpoints.remove
            if self._has_own_io and not _is_directory_of_shards(path):
                remove = self._io.remove_checkpoint
            self.saves.afterwards(partial(remove, path))

    def end_saves(self, exception: BaseException) -> None:
        """Waits for the save in flight where an exception ends the run; what that met is told beside it."""
        try:
            self.saves.wait()
        except Exception as error:
            exception.add_note(f"beside that, a checkpoint could not be written: {error}")

    def load(self, path: private.Path, weights_only: bool | None = None, resume: bool = True) -> dict[str, Any]:
        """Before the module is set up, as in one process: hooks may change it, and optimizers are made for what is
        there then. What is loaded into parameters that are deferred is kept, and loaded in setup. Where it is to
        ``resume``, the run's data and random numbers go on where the checkpoint says.
        """
        self._source = path
        self.saves.wait()
        if not self._is_set_up:
            self._begin_from_pretrained()
            if any(parameter.is_meta for parameter in self._module.parameters()):
                self._late_loads = LateLoads(self._module, path)
        checkpoint = self._read(path, weights_only)
        if checkpoints.holds_no_run(checkpoint):
            return self._without_run(checkpoint, path)
        if resume:
            self._resume.go_on_from(checkpoint)
        hook, callbacks = "on_load_checkpoint", self._trainer.callbacks
        is_seen = is_overridden(hook, self._module) or any(is_overridden(hook, c, Callback) for c in callbacks)
        if self._late_loads is None and is_seen:
            # whole as the module is by now; what is deferred may be too large for that
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {n: v.plain() if isinstance(v, OnDisk) else v for n, v in state.items()}
        return checkpoint

    @property
    def _is_training(self) -> bool:
        return self._trainer.state.fn == TrainerFn.FITTING

    def _read(self, path: private.Path, weights_only: bool | None) -> dict[str, Any]:
        if self._has_own_io and not broadcast_object(_is_directory_of_shards(path)):
            with raise_on_all_ranks(f"read checkpoint {path}"):
                return self._io.load_checkpoint(path, weights_only=weights_only)
        is_whole = not self._is_set_up and not any(isinstance(p, DTensor) for p in self._module.parameters())
        paths = [path, *self._restart.older_than(path), *self._older_than_last(path)]
        while True:
            self._source = path = paths.pop(0)
            try:
                return checkpoints.load(
                    path, self._module, optimizers=self._is_training, weights_only=weights_only, when_used=is_whole
                )
            except checkpoints.DamagedCheckpoint as error:
                if not paths:
                    raise
                rank_zero_warn(f"{error}. This run goes on from the newest before it, {paths[0]}")

    def _without_run(self, weights: dict[str, Any], path: private.Path) -> dict[str, Any]:
        if self._is_training:
            raise ValueError(
                f"{path} holds weights, but no run to go on with; HybridStrategy(pretrained=...) begins one from them"
            )
        return {**weights, "pytorch-lightning_version": pl.__version__}  # which Lightning asks for

    def _older_than_last(self, path: private.Path) -> list[Path]:
        """Other checkpoints beside the one that ``ckpt_path="last"`` chose, newest first; none for another one."""
        found: list[Path] = []
        callbacks = [
            callback for callback in self._trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)
        ]
        last = {Path(file).resolve() for c in callbacks for file in private.last_checkpoints(c, self._trainer)}
        with raise_on_all_ranks("list checkpoints"):
            if self._ranks.rank == 0 and Path(path).resolve() in last:
                beside = (p for p in Path(path).parent.iterdir() if p.suffix == Path(path).suffix and p != Path(path))
                found = sorted(filter(Path.exists, beside), key=lambda p: p.stat().st_mtime, reverse=True)
        return list(broadcast_object(found))

    def load_model_state(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads a checkpoint's weights into the module."""
        state = checkpoint["state_dict"]
        if self._late_loads is not None:
            self._module.load_state_dict(state, strict=strict)
        else:
            checkpoints.load_model_state(self._module, state, strict, self._source)

    def load_optimizer_states(self, checkpoint: Mapping[str, Any], targets: list[Optimizer]) -> None:
        """Loads a checkpoint's states of optimizers into those of the run."""
        states = checkpoint["optimizer_states"]
        if states and len(states) != len(targets):  # a hook may have taken all of them out
            raise ValueError(
                f"checkpoint {self._source} has the states of {len(states)} optimizers, and configure_optimizers "
                f"returns {len(targets)}; return what the saved run had, or begin from its weights alone by "
                "HybridStrategy(pretrained=...)"
            )
        names = checkpoints.parameter_names(self._module)
        for optimizer, state in zip(targets, states, strict=False):
            checkpoints.load_optimizer_state(optimizer, state, names, self._source)

    def before_setup(self) -> None:
        """All hooks have seen the checkpoint."""
        if self._late_loads is not None:
            self._late_loads.leave()

    def load_into_divided(self) -> None:
        """Loads the weights that a fit begins from, and over them a checkpoint's, where parameters were deferred."""
        self._is_set_up = True
        late, self._late_loads = self._late_loads, None
        self._begin_from_pretrained()
        if late is not None:
            late.apply()

    def _begin_from_pretrained(self) -> None:
        """Loads the weights that a fit begins from, once for a module.

        A checkpoint to go on from is read later, over them: it may hold only what was trained.
        """
        module = self._module
        if self.options.pretrained is None or not self._is_training or module in self._begun:
            return
        if not self._is_set_up and any(parameter.is_meta for parameter in module.parameters()):
            return  # when they are there
        state = checkpoints.load(self.options.pretrained, module, optimizers=False, when_used=True)["state_dict"]
        checkpoints.load_model_state(module, state, module.strict_loading, self.options.pretrained)
        self._begun.add(module)

    def on_train_start(self) -> None:
        """Warns where a run begins anew beside a ``last`` checkpoint that Lightning does not see."""
        for callback in self._trainer.checkpoint_callbacks if not self._trainer.ckpt_path else ():
            if self._ranks.rank == 0 and isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
                _warn_of_unseen_last(callback.dirpath, callback.CHECKPOINT_NAME_LAST)

    def detach(self) -> None:
        """The run ends, perhaps by an exception between the restoring and the setup."""
        self._is_set_up = False
        if self._late_loads is not None:
            self._late_loads.leave()
            self._late_loads = None


def stage_ranks(ranks: LayoutRanks) -> StageRanks | None:
    """The ranks that hold the stages of a pipeline, from this rank's view; None without one."""
    if ranks.mesh is None or ranks.layout is None or ranks.layout.pp == 1:
        return None
    place = ranks.layout.coordinates(ranks.rank)
    writes = not any(index for axis, index in place.items() if axis != "pp")
    return StageRanks(ranks.mesh.root["pp"].get_group(), writes, ranks.device)


def _is_directory_of_shards(path: private.Path) -> bool:
    """Also where a user's ``CheckpointIO`` knows the path, and nobody else."""
    try:
        return checkpoints.is_sharded(path)
    except (OSError, ValueError):
        return False


def _warn_of_unseen_last(path: private.Path, prefix: str) -> None:
    """Lightning (2.6.6) looks for what ``ckpt_path="last"`` means without the protocol of a URL, and finds nothing."""
    folder = checkpoints.as_path(path)
    if isinstance(folder, Path) or not folder.exists():
        return
    found = sorted(str(file) for file in folder.iterdir() if file.name.startswith(prefix))
    if found:
        rank_zero_warn(
            f"This run begins anew, and {found[-1]} is there. Lightning's ckpt_path='last' sees local directories "
            "only: pass the URL itself to go on from it"
        )
