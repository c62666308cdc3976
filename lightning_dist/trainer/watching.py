"""A run of a Trainer is watched for ranks that hang or lag."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from lightning_dist.elastic.attempt import Attempt
from lightning_dist.elastic.watch import Watch
from lightning_dist.ranks import LayoutRanks


class Watching:
    """Begins and ends the :class:`Watch` of a run, and tells it where the run is.

    ``report_stragglers``: whether rank 0 logs which rank is slower than the others.
    """

    def __init__(self, ranks: LayoutRanks, report_stragglers: bool) -> None:
        self._ranks, self._report_stragglers = ranks, report_stragglers
        self._trainer: Any = None
        self._watch: Watch | None = None
        self.is_set_up = False

    def begin(self, trainer: pl.Trainer) -> None:
        """The process group is there; nothing in one process, nor in a dry run, where nobody is waited for."""
        self._trainer, self.is_set_up = trainer, False
        if self._ranks.world_size > 1 and self._watch is None and dist.get_backend() != "fake":
            groups = lambda: self._ranks.groups  # noqa: E731
            self._watch = Watch.begin(groups, self._ranks.device, self._batch, self._step, self._stages)

    def loops_begin(self) -> None:
        """The run is set up. Communication: where agents start ranks again, one broadcast of the logs' folder."""
        self.is_set_up = True
        attempt = Attempt.current()
        if attempt is not None and self._trainer.loggers:
            directory = self._trainer.log_dir
            if directory is not None and self._ranks.rank == 0:
                attempt.record("logs", directory=str(directory))

    @property
    def waited(self) -> float | None:
        """Seconds in which this run's process was in collectives or waited for them; None where it is not watched."""
        return None if self._watch is None else self._watch.waited

    def end(self, failed: bool = False) -> None:
        """The run ends, perhaps by an exception."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.end(failed)

    def _batch(self) -> int | None:
        """Number of training batches begun; None outside of training."""
        trainer = self._trainer
        return trainer.fit_loop.epoch_loop.batch_progress.total.ready if self.is_set_up and trainer.training else None

    def _step(self) -> str:
        trainer = self._trainer
        if not self.is_set_up:
            return f"set-up of {trainer.state.fn.value}"
        if trainer.training:
            return f"training step {trainer.global_step} (batch {trainer.fit_loop.epoch_loop.batch_idx} of its epoch)"
        stage = trainer.state.stage
        return f"{'the end' if stage is None else stage.value} after training step {trainer.global_step}"

    def _stages(self) -> list[tuple[int, ...]]:
        """The ranks of each stage under ``pp``, all of which do the same work."""
        layout = self._ranks.layout
        if layout is None or not self._report_stragglers:
            return []
        stage_of = [layout.coordinates(rank)["pp"] for rank in range(self._ranks.world_size)]
        return [tuple(r for r, of in enumerate(stage_of) if of == stage) for stage in range(layout.pp)]
