"""Lightning's hooks of a strategy that save and load: state dicts of whole tensors, files that fit every layout."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dist import checkpoint as checkpoints
from lightning_dist import optimizers
from lightning_dist.resume import ResumeHooks


class CheckpointHooks(ResumeHooks):
    """The part of a strategy that knows checkpoints."""

    checkpoint_format: Literal["auto", "single", "sharded"] = "auto"
    _checkpoint_path: _PATH | None = None

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
        """Every rank calls it. See :func:`lightning_dist.checkpoint.save` for what is communicated."""
        checkpoint = self._with_resume(checkpoint)
        write = None
        if storage_options is not None or type(self.checkpoint_io) is not TorchCheckpointIO:
            write = partial(self.checkpoint_io.save_checkpoint, storage_options=storage_options)
        checkpoints.save(checkpoint, filepath, sharded=self.saves_shards, write=write, stages=self.stage_ranks)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        self._checkpoint_path = checkpoint_path
        checkpoint = checkpoints.load(
            checkpoint_path,
            self.lightning_module,
            optimizers=self.lightning_module.trainer.state.fn == TrainerFn.FITTING,
            weights_only=weights_only,
        )
        self._resume_from(checkpoint)
        return checkpoint

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
            checkpoints.remove(filepath)
