"""Lightning's hooks of a strategy that save and load: state dicts of whole tensors, files that fit every layout."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import lightning.pytorch as pl
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dist import checkpoint as checkpoints
from lightning_dist import optimizers
from lightning_dist.checkpoint.agreement import from_rank_zero, together
from lightning_dist.checkpoint.background import BackgroundSaves
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

    @override
    def setup_environment(self) -> None:
        if self.pretrained is not None:
            # what is not there is refused before processes talk
            checkpoints.is_sharded(self.pretrained)
        if self.async_save:
            assert self.lightning_module is not None
            _refuse_links(self.lightning_module.trainer)
        super().setup_environment()

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def saves_shards(self) -> bool:
        """Whether a checkpoint is a directory to which every rank writes what it holds."""
        return self.checkpoint_format == "sharded" or (self.checkpoint_format == "auto" and self._holds_shards)

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
        assert self.lightning_module is not None
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
        write = None
        if storage_options is not None or type(self.checkpoint_io) is not TorchCheckpointIO:
            write = partial(self.checkpoint_io.save_checkpoint, storage_options=storage_options)
        checkpoints.save(
            checkpoint,
            filepath,
            sharded=self.saves_shards,
            write=write,
            stages=self.stage_ranks,
            background=self._saves if self.async_save else None,
        )

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        self._checkpoint_path = checkpoint_path
        self._saves.wait()
        training = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        paths = [checkpoint_path, *self._older_than_last(checkpoint_path)]
        while True:
            self._checkpoint_path = path = paths.pop(0)
            try:
                checkpoint = checkpoints.load(
                    path, self.lightning_module, optimizers=training, weights_only=weights_only
                )
            except checkpoints.DamagedCheckpoint as error:
                if not paths:
                    raise
                rank_zero_warn(f"{error}. This run goes on from the newest before it, {paths[0]}")
            else:
                if checkpoints.holds_no_run(checkpoint):
                    return self._without_run(checkpoint, path, training)
                self._resume_from(checkpoint)
                return checkpoint

    def _without_run(self, weights: dict[str, Any], path: _PATH, training: bool) -> dict[str, Any]:
        if training:
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
        if self.pretrained is None or module.trainer.state.fn != TrainerFn.FITTING:
            return
        if self._begun_modules is None:
            self._begun_modules = WeakSet()
        if module in self._begun_modules:
            return
        self._begun_modules.add(module)
        state = checkpoints.load(self.pretrained, module, optimizers=False)["state_dict"]
        checkpoints.load_model_state(module, state, module.strict_loading, self.pretrained)

    def _older_than_last(self, path: _PATH) -> list[Path]:
        """Other checkpoints beside the one that ``ckpt_path="last"`` chose, newest first; none for another one."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        found: list[Path] = []
        last = set[Path]().union(*(_last_checkpoints(callback, trainer) for callback in trainer.checkpoint_callbacks))
        with together("list checkpoints"):
            if self.is_global_zero and Path(path).resolve() in last:
                beside = (p for p in Path(path).parent.iterdir() if p.suffix == Path(path).suffix and p != Path(path))
                found = sorted(filter(Path.exists, beside), key=lambda p: p.stat().st_mtime, reverse=True)
        return list(from_rank_zero(found))

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
        checkpoints.load_model_state(self.lightning_module, state, strict, self._checkpoint_path)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.lightning_module is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            checkpoints.load_optimizer_state(self.lightning_module, optimizer, state, self._checkpoint_path)
            optimizers.settle(optimizer)

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        if self.is_global_zero:
            self._saves.afterwards(partial(checkpoints.remove, filepath))

    def _end_saves(self, exception: BaseException) -> None:
        """Waits for the save in flight where an exception ends the run; what that met is told beside it."""
        try:
            self._saves.wait()
        except Exception as error:
            exception.add_note(f"beside that, a checkpoint could not be written: {error}")


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
