"""Snapshots of a fit in memory that outlives its ranks: taken after optimizer steps, found when ranks start again."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_dist.checkpoint.slots import Header, read_header, two_slots
from lightning_dist.checkpoint.snapshot_read import SNAPSHOTS, buffers_of_this_rank, on_this_node
from lightning_dist.checkpoint.snapshot_state import PartOfState
from lightning_dist.compat import lightning as private
from lightning_dist.elastic.attempt import Attempt
from lightning_dist.elastic.states import SavedState
from lightning_dist.patches import Patches
from lightning_dist.ranks import LayoutRanks
from lightning_dist.trainer.module_setup import ModuleSetup
from lightning_dist.trainer.resume import Resume
from lightning_dist.trainer.snapshot_partner import Partner
from lightning_dist.trainer.snapshot_search import Found, Nodes, find_snapshot
from lightning_dist.trainer.snapshot_writer import SnapshotWriter


@dataclass(frozen=True)
class SnapshotOptions:
    """``snapshot_every_n_steps`` of the strategy; raises a ValueError for what is no number of steps."""

    every_n_steps: int | None = None

    def __post_init__(self) -> None:
        steps = self.every_n_steps
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise ValueError(f"snapshot_every_n_steps={steps!r} is no number of steps; choose 1 or more, or None")


class Snapshots:
    """Takes the snapshots of a fit, and finds those of an attempt before.

    Communication, where the option is on and ranks would be started again: at the start of a fit, a process group of
    gloo is made, and see :func:`~lightning_dist.trainer.snapshot_search.find_snapshot`; after a snapshot, see
    :class:`~lightning_dist.trainer.snapshot_writer.SnapshotWriter`. ``is_searching`` tells whether one of Lightning's
    finders runs, whose steps are none of the fit's.
    """

    def __init__(
        self,
        ranks: LayoutRanks,
        resume: Resume,
        setup: ModuleSetup,
        options: SnapshotOptions,
        is_searching: Callable[[], bool],
    ) -> None:
        self._ranks, self._resume, self._setup, self._options = ranks, resume, setup, options
        self._is_searching = is_searching
        self._trainer: Any = None
        self.is_taking = False
        """Whether Lightning collects a state for a snapshot now, to which no rank may add by a collective."""
        self._fit, self._folder, self._step = "", Path(), 0
        self._nodes: Nodes | None = None
        """Where the ranks are, while a fit takes snapshots."""
        self._found: Found | None = None
        self._group: Any = None
        self._state: PartOfState | None = None
        self._holders: list[int] = []
        """The ranks of this node that hold the same as this one, each of which writes its share of it."""
        self._writer: SnapshotWriter | None = None

    def begin(self, trainer: pl.Trainer, attempt: Attempt, fit: int) -> SavedState | None:
        """The fit of a number begins, on all ranks: what it can go on from. None where nothing is there, or the option
        is off.
        """
        if self._options.every_n_steps is None:
            return None
        module = trainer.lightning_module
        self._trainer, self._fit = trainer, f"{fit}-{type(module).__name__}"
        self._folder, self._nodes = attempt.directory / SNAPSHOTS, Nodes.of(attempt.directory)
        self._folder.mkdir(exist_ok=True)
        if self._ranks.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        # what a module builds in configure_model is read when it is divided
        in_parts = self._ranks.holds_shards and not any(True for _ in module.parameters())
        self._found = find_snapshot(self._folder, self._fit, self._nodes, self._arrangement, self._group, in_parts)
        return self._found.state

    @property
    def _arrangement(self) -> str:
        """What has to be the same for a rank to go on with its own part; an undecided layout is like no other."""
        assert self._nodes is not None
        return hashlib.sha256(f"{self._ranks.layout} on {self._nodes.of_ranks}".encode()).hexdigest()

    def attach(self, trainer: pl.Trainer, patches: Patches) -> None:
        """The loops of a fit are about to begin. Raises a ValueError for an optimizer that would have to gather."""
        if self._nodes is None or self._found is None:
            if self._options.every_n_steps is not None:
                rank_zero_info(
                    "snapshot_every_n_steps: nobody would start these ranks again, so no snapshots are taken; start "
                    "the script by lightning-dist run, or call lightning_dist.launch"
                )
            return
        if any(hasattr(optimizer, "consolidate_state_dict") for optimizer in trainer.optimizers):
            raise ValueError(
                "snapshot_every_n_steps with an optimizer that deals its states to the ranks: each snapshot would "
                "gather them to one rank; choose dp_shard, which divides them too, or save checkpoints more often"
            )
        runner = self._setup.runner
        stale = () if runner is None else runner.buffers_of_others()
        place = self._place_of(self._ranks.rank)
        self._holders = [rank for rank in self._nodes.beside if self._place_of(rank) == place]
        replica = self._holders.index(self._ranks.rank), len(self._holders)
        self._state = PartOfState(trainer.lightning_module, replica, stale)
        kept, partner = self._found.order, None
        if self._nodes.count > 1:
            partner = Partner(self._nodes, self._group, self._folder, self._fit, kept)
        slots = two_slots(self._folder, f"{self._fit}-{self._ranks.rank}", kept)
        self._writer = SnapshotWriter(slots, self._group, partner)
        for optimizer in trainer.optimizers:
            # so no rank has finished a step while one has not the snapshot of the step before
            patches.also(optimizer.register_step_pre_hook(self._before_step).remove)
        patches.wrap(trainer.fit_loop.epoch_loop, "on_advance_end", self._after_batch)
        patches.wrap(trainer.fit_loop, "on_advance_end", self._after_epoch)

    def _place_of(self, rank: int) -> str:
        """Ranks of the same place hold the same of parameters and optimizer states."""
        assert self._ranks.layout is not None
        coordinates = self._ranks.layout.coordinates(rank)
        return ",".join(f"{axis}={index}" for axis, index in coordinates.items() if axis != "dp_replicate")

    def on_train_start(self) -> None:
        """Everything is restored, but for what differs by rank and was made equal since: buffers. All ranks have read
        what they go on from.
        """
        if self._found is None or self._nodes is None:
            return
        self._step, state = self._trainer.global_step, self._found.state
        if state is None:
            return
        path = on_this_node(Path(state.path))
        if Path(self._trainer.ckpt_path).parts[-2:] == path.parts[-2:]:  # and not from a newer checkpoint
            _restore(self._trainer.lightning_module, buffers_of_this_rank(path) or {})
        if self._group is not None:
            dist.barrier(self._group)
        if self._nodes.is_first:
            shutil.rmtree(path)

    def _after_batch(self, original: Callable[..., None], *args: Any) -> None:
        """Wraps Lightning's method that ends a batch, with the validation that may follow it."""
        original(*args)
        progress = self._trainer.fit_loop.epoch_loop.batch_progress
        is_last = progress.is_last_batch or progress.current.processed >= self._trainer.fit_loop.max_batches
        if not is_last:  # else when the epoch has ended
            self._take_if_due()

    def _after_epoch(self, original: Callable[..., None], *args: Any) -> None:
        """Wraps Lightning's method that ends an epoch."""
        original(*args)
        self._take_if_due()

    def _before_step(self, *_: Any) -> None:
        assert self._writer is not None
        self._writer.wait()

    def _take_if_due(self) -> None:
        assert self._options.every_n_steps is not None
        assert self._writer is not None
        step = self._trainer.global_step
        is_due = step < self._step or step - self._step >= self._options.every_n_steps  # a training may go back
        if is_due and self._writer.goes_on and not self._is_searching():
            self._step = step
            self._take(self._writer)

    def _take(self, writer: SnapshotWriter) -> None:
        """Copies this rank's part now, and has a thread finish it."""
        assert self._state is not None
        self.is_taking = True
        try:
            checkpoint, own = self._resume.of_this_rank(private.dump_checkpoint(self._trainer))
        finally:
            self.is_taking = False
        tensors, small = self._state.find(checkpoint, own)
        writer.wait()
        if not writer.goes_on:
            return
        if writer.count == 1:
            self._remove_others()  # all ranks have one of this attempt
        writer.write(self._header(writer.count, small), self._state.written, tensors, self._state.table, small)

    def _header(self, count: int, small: bytes) -> Header:
        assert self._state is not None
        assert self._found is not None
        return Header(
            fit=self._fit,
            order=(self._found.attempt, count),
            step=self._step,
            batches=self._trainer.fit_loop.epoch_loop.batch_progress.total.processed,
            time=time.time(),
            rank=self._ranks.rank,
            arrangement=self._arrangement,
            num_ranks=self._ranks.world_size,
            place=self._place_of(self._ranks.rank),
            num_places=len({self._place_of(rank) for rank in range(self._ranks.world_size)}),
            holders=tuple(self._holders),
            tensors=self._state.nbytes,
            table=len(self._state.table),
            small=len(small),
        )

    def _remove_others(self) -> None:
        """Removes from this node what ranks wrote in an attempt before that are no longer here."""
        assert self._nodes is not None
        kept = {rank for rank in range(self._ranks.world_size) if self._nodes.keeps(rank)}
        if self._nodes.is_first:
            for file in self._folder.glob(f"{self._fit}-*.[01]"):
                header = read_header(file)
                if header is not None and header.rank not in kept:
                    file.unlink()

    def leave(self, failed: bool) -> None:
        """The fit ends. Its last snapshot stays: a script that is started again goes on from its end."""
        if self._writer is not None:
            self._writer.end(failed)
        if self._group is not None and not failed and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._nodes = self._group = self._state = self._writer = self._found = self._trainer = None


@torch.no_grad()
def _restore(module: nn.Module, values: dict[str, Any]) -> None:
    for name, buffer in module.named_buffers():
        if name in values and buffer.shape == values[name].shape:
            buffer.copy_(values[name])
