"""Lightning's hooks of a strategy that save and load: state dicts of whole tensors, files that fit every layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import lightning.pytorch as pl
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dist import checkpoint as checkpoints
from lightning_dist import optimizers
from lightning_dist.checkpoint.background import BackgroundSaves
from lightning_dist.checkpoint.late import LateLoads
from lightning_dist.checkpoint.on_disk import OnDisk, read_what_is_kept
from lightning_dist.collectives import broadcast_object, raise_on_all_ranks
from lightning_dist.plans.pretrained import DESCRIPTIONS, descriptions
from lightning_dist.resume import ResumeHooks


class CheckpointHooks(ResumeHooks):
    """The part of a strategy that knows checkpoints."""

    checkpoint_format: Literal["auto", "single", "sharded"] = "auto"
    async_save = False
    pretrained: _PATH | None = None
    _begun_modules: WeakSet[pl.LightningModule] | None = None  # made in the ranks: it can't be sent to them
    _saves: BackgroundSaves
    _checkpoint_path: _PATH | None = None
    _late_loads: LateLoads | None = None

    @override
    def setup_environment(self) -> None:
        if self.pretrained is not None:
            # what is not there is refused before processes talk
            checkpoints.is_sharded(self.pretrained)
        if self.async_save:
            assert self.lightning_module is not None
            _refuse_links(self.lightning_module.trainer)
        if self.checkpoint_format == "sharded" and self._has_own_io:
            raise ValueError(
                f'checkpoint_format="sharded" with a {type(self.checkpoint_io).__name__}: every rank writes its part '
                'of a directory, and a CheckpointIO writes the whole from one; choose checkpoint_format="single", or '
                "leave the plugin out (async_save=True writes in the background)"
            )
        super().setup_environment()

    @property
    def _has_own_io(self) -> bool:
        """Whether the user brought what writes, reads and removes checkpoints."""
        return type(self.checkpoint_io) is not TorchCheckpointIO

    @property
    def saves_shards(self) -> bool:
        """Whether a checkpoint is a directory to which every rank writes what it holds."""
        if self.checkpoint_format == "auto":
            # not in the process that started others, which has whole weights
            return self._holds_shards and not self._has_own_io and dist.is_initialized()
        return self.checkpoint_format == "sharded"

    @property
    def _holds_shards(self) -> bool:
        return self.world_size > 1 and self.layout is not None and self.layout.holds_shards

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        self._settle()
        return self._buffers_at_step(checkpoints.model_state(self.lightning_module))

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As in Lightning's strategies, one that deals its states to the ranks (``ZeroRedundancyOptimizer``) gathers
        them to rank 0, over its own group.
        """
        assert self.lightning_module is not None
        if hasattr(optimizer, "consolidate_state_dict"):
            optimizer.consolidate_state_dict()
            if not self.is_global_zero:
                return {}
        return checkpoints.optimizer_state_by_name(self.lightning_module, optimizer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Every rank calls it. See :func:`lightning_dist.checkpoint.save` for what is communicated.

        With ``async_save`` it returns when the state has been copied to host memory; the next save, the end of the
        run, an exception and a signal wait for the one in flight, and raise what it met.
        """
        assert self.lightning_module is not None
        checkpoint = self._with_resume(checkpoint)
        if described := descriptions(self.lightning_module):
            checkpoint[DESCRIPTIONS] = described
        if storage_options is not None and not self._has_own_io:
            raise TypeError(
                "Trainer.save_checkpoint(..., storage_options=...) needs a CheckpointIO that knows what to do with "
                "them: pass one to the Trainer's plugins"
            )
        checkpoints.save(
            checkpoint,
            filepath,
            sharded=self.saves_shards,
            write=partial(self._write, filepath, storage_options) if self._has_own_io else None,
            stages=self.stage_ranks,
            background=self._saves if self.async_save else None,
        )

    def _write(self, filepath: _PATH, storage_options: Any | None, checkpoint: dict[str, Any], _: Path) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Before :meth:`setup`, as in one process: hooks may change the module, optimizers are made for what is there
        then. What is loaded into parameters that are deferred is kept, and loaded in setup.
        """
        assert self.lightning_module is not None
        self._checkpoint_path = checkpoint_path
        self._saves.wait()
        if not self._is_set_up:
            self._begin_from_pretrained()
            self._load_late(checkpoint_path)
        checkpoint = self._read(checkpoint_path, weights_only)
        if checkpoints.holds_no_run(checkpoint):
            return self._without_run(checkpoint, checkpoint_path)
        self._resume_from(checkpoint)
        if self._late_loads is None and _has_hooks(self.lightning_module):
            # whole as the module is by now; what is deferred may be too large for that
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {n: v.plain() if isinstance(v, OnDisk) else v for n, v in state.items()}
        return checkpoint

    @property
    def _is_training(self) -> bool:
        assert self.lightning_module is not None
        return self.lightning_module.trainer.state.fn == TrainerFn.FITTING

    def _read(self, path: _PATH, weights_only: bool | None) -> dict[str, Any]:
        module = self.lightning_module
        assert module is not None
        if self._has_own_io and not broadcast_object(_is_directory_of_shards(path)):
            with raise_on_all_ranks(f"read checkpoint {path}"):
                return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        is_whole = not self._is_set_up and not any(isinstance(p, DTensor) for p in module.parameters())
        paths = [path, *self._older_than_last(path)]
        while True:
            self._checkpoint_path = path = paths.pop(0)
            try:
                return checkpoints.load(
                    path, module, optimizers=self._is_training, weights_only=weights_only, when_used=is_whole
                )
            except checkpoints.DamagedCheckpoint as error:
                if not paths:
                    raise
                rank_zero_warn(f"{error}. This run goes on from the newest before it, {paths[0]}")

    def _load_late(self, path: _PATH) -> None:
        module = self.lightning_module
        assert module is not None
        if any(parameter.is_meta for parameter in module.parameters()):
            self._late_loads = LateLoads(module, path)

    def _end_restoring(self) -> None:
        """Before parameters are divided: all hooks have seen the checkpoint."""
        if self._late_loads is not None:
            self._late_loads.leave()

    def _load_weights(self) -> None:
        """Those that a fit begins from, and over them a checkpoint's, where parameters were deferred until now."""
        late, self._late_loads = self._late_loads, None
        self._begin_from_pretrained()
        if late is not None:
            late.apply()

    def _forget_what_came_early(self) -> None:
        """After an exception between the restoring and the setup."""
        if self._late_loads is not None:
            self._late_loads.leave()
            self._late_loads = None

    def _without_run(self, weights: dict[str, Any], path: _PATH) -> dict[str, Any]:
        if self._is_training:
            raise ValueError(
                f"{path} holds weights, but no run to go on with; HybridStrategy(pretrained=...) begins one from them"
            )
        return {**weights, "pytorch-lightning_version": pl.__version__}  # which Lightning asks for

    def _begin_from_pretrained(self) -> None:
        """Weights that a fit begins from, once for a module.

        A checkpoint to go on from is read later, over them: it may hold only what was trained.
        """
        module = self.lightning_module
        assert module is not None
        if self.pretrained is None or not self._is_training:
            return
        if not self._is_set_up and any(parameter.is_meta for parameter in module.parameters()):
            return  # when they are there
        if self._begun_modules is None:
            self._begun_modules = WeakSet()
        if module in self._begun_modules:
            return
        state = checkpoints.load(self.pretrained, module, optimizers=False, when_used=True)["state_dict"]
        checkpoints.load_model_state(module, state, module.strict_loading, self.pretrained)
        self._begun_modules.add(module)

    def _older_than_last(self, path: _PATH) -> list[Path]:
        """Other checkpoints beside the one that ``ckpt_path="last"`` chose, newest first; none for another one."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        found: list[Path] = []
        last = set[Path]().union(*(_last_checkpoints(callback, trainer) for callback in trainer.checkpoint_callbacks))
        with raise_on_all_ranks("list checkpoints"):
            if self.is_global_zero and Path(path).resolve() in last:
                beside = (p for p in Path(path).parent.iterdir() if p.suffix == Path(path).suffix and p != Path(path))
                found = sorted(filter(Path.exists, beside), key=lambda p: p.stat().st_mtime, reverse=True)
        return list(broadcast_object(found))

    @override
    def barrier(self, name: str | None = None) -> None:
        """Lightning comes here before it runs a stage, when all that it restores has been restored (seen in 2.6.6)."""
        if name == "run-stage":
            read_what_is_kept()
        super().barrier(name)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if self.is_global_zero and not trainer.ckpt_path:
            for callback in trainer.checkpoint_callbacks:
                _warn_of_unseen_last(callback)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        state = checkpoint["state_dict"]
        if self._late_loads is not None:
            self.lightning_module.load_state_dict(state, strict=strict)
            return
        checkpoints.load_model_state(self.lightning_module, state, strict, self._checkpoint_path)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.lightning_module is not None
        states = checkpoint["optimizer_states"]
        if states and len(states) != len(self.optimizers):  # a hook may have taken all of them out
            raise ValueError(
                f"checkpoint {self._checkpoint_path} has the states of {len(states)} optimizers, and "
                f"configure_optimizers returns {len(self.optimizers)}; return what the saved run had, or begin from "
                "its weights alone by HybridStrategy(pretrained=...)"
            )
        for optimizer, state in zip(self.optimizers, states, strict=False):
            checkpoints.load_optimizer_state(self.lightning_module, optimizer, state, self._checkpoint_path)
            optimizers.settle(optimizer)

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        if self.is_global_zero:
            remove: Callable[[Any], None] = checkpoints.remove
            if self._has_own_io and not _is_directory_of_shards(filepath):
                remove = self.checkpoint_io.remove_checkpoint
            self._saves.afterwards(partial(remove, filepath))

    def _end_saves(self, exception: BaseException) -> None:
        """Waits for the save in flight where an exception ends the run; what that met is told beside it."""
        try:
            self._saves.wait()
        except Exception as error:
            exception.add_note(f"beside that, a checkpoint could not be written: {error}")


def _has_hooks(module: pl.LightningModule) -> bool:
    """Whether code of the user's sees the checkpoint before it is loaded."""
    callbacks: list[Any] = module.trainer.callbacks  # type: ignore[attr-defined]
    hook = "on_load_checkpoint"
    return is_overridden(hook, module) or any(is_overridden(hook, callback, Callback) for callback in callbacks)


def _is_directory_of_shards(path: _PATH) -> bool:
    """Also where a user's ``CheckpointIO`` knows the path, and nobody else."""
    try:
        return checkpoints.is_sharded(path)
    except (OSError, ValueError):
        return False


def _refuse_links(trainer: pl.Trainer) -> None:
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "save_last", None) == "link":
            raise ValueError(
                'async_save=True with ModelCheckpoint(save_last="link"): the link would be there before what it points '
                "to; choose save_last=True, or saves that the training waits for"
            )


def _warn_of_unseen_last(callback: Any) -> None:
    """Lightning (2.6.6) looks for what ``ckpt_path="last"`` means without the protocol of a URL, and finds nothing."""
    folder = getattr(callback, "dirpath", None)
    if not isinstance(callback, ModelCheckpoint) or folder is None:
        return
    folder = checkpoints.located(folder)
    if isinstance(folder, Path) or not folder.exists():
        return
    found = sorted(str(file) for file in folder.iterdir() if file.name.startswith(callback.CHECKPOINT_NAME_LAST))
    if found:
        rank_zero_warn(
            f"This run begins anew, and {found[-1]} is there. Lightning's ckpt_path='last' sees local directories "
            "only: pass the URL itself to go on from it"
        )


def _last_checkpoints(callback: Any, trainer: pl.Trainer) -> set[Path]:
    """That Lightning chooses from for ``ckpt_path="last"``."""
    if not isinstance(callback, ModelCheckpoint):
        return set()
    return {Path(path).resolve() for path in callback._find_last_checkpoints(trainer)}
