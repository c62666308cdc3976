"""Lightning's hooks of a strategy that a finder's search hears of."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from lightning.fabric.utilities.types import _PATH
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from lightning_dist.checkpoint.hooks import CheckpointHooks
from lightning_dist.tuning import SearchRanks, Tuning, validate_tuner


class TuningHooks(CheckpointHooks):
    """The part of a strategy that knows Lightning's finders."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tuning = Tuning()

    def _search_ranks(self) -> SearchRanks:
        return SearchRanks(
            rank=self.global_rank,
            world_size=self.world_size,
            num_data_ranks=self.num_data_ranks,
            layout=self.layout,
            device=self.root_device,
            groups=self._groups,
            timeout=self._timeout or default_pg_timeout,
            reduce=self.reduce,
        )

    @override
    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        validate_tuner(self.lightning_module.trainer, self._start_method)
        super().setup_environment()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """As that of :class:`CheckpointHooks`; a finder's begins a search."""
        filepath = self._tuning.begin(filepath, self._trainer, self._search_ranks(), self._last_step)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        return super().load_checkpoint(self._tuning.path(checkpoint_path), weights_only)

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        ends = self._tuning.ends_with(filepath)
        super().remove_checkpoint(self._tuning.path(filepath) if ends else filepath)
        if ends:
            self._last_step = self._tuning.end()

    def _leave_search(self) -> None:
        if self._tuning.is_searching:
            self._last_step = self._tuning.leave()

    @override
    def _resume_from(self, checkpoint: Any) -> None:
        if not self._tuning.is_searching:  # a finder goes back to where it was; the loaders begin their epoch anew
            super()._resume_from(checkpoint)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._tuning.watch_losses()

    def _trial(self) -> AbstractContextManager[None]:
        return self._tuning.agreed(self._forget_step)

    def _forget_step(self) -> None:
        assert self._parallel is not None
        self._parallel.forget_step()

    def _apart(self) -> AbstractContextManager[None]:
        assert self._parallel is not None
        return self._tuning.apart(self._parallel)

    @override
    def batch_to_device(self, *args: Any, **kwargs: Any) -> Any:
        with self._trial():
            return super().batch_to_device(*args, **kwargs)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._trial():
            return super().optimizer_step(*args, **kwargs)

    @override
    def barrier(self, name: str | None = None) -> None:
        self._tuning.raise_if_broken()
        super().barrier(name)
