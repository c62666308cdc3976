"""Where a training stands between two steps, so that one that goes on from a checkpoint does so as if never stopped.

[Note: what a checkpoint is the state of]
The last optimizer step. Between two of them gradients add up, which no checkpoint holds: one that is written there
says how things stood at the step before, in random states, buffers and progress, and a resumed run takes those
microsteps again.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_dist.data import TrainingData
from lightning_dist.divided.averages import copies_of
from lightning_dist.loaders import LoaderHooks
from lightning_dist.parallel import Alone, average_buffers
from lightning_dist.randomness import RandomStates, kept_random_states, seed_generators

RESUME = "lightning_dist_resume"
"""The entry of a checkpoint that says where the data and the random generators stood."""


@dataclass(frozen=True)
class _Step:
    """How things stood when the batch after an optimizer step was asked for, or when the run began."""

    random: RandomStates
    batches: int
    """That were done by then, of all epochs."""
    buffers: dict[str, Tensor]
    """Copies; only where gradients of several batches add up."""


class ResumeHooks(LoaderHooks):
    """The part of a strategy that knows where in its data and its random streams a training is."""

    _last_step: _Step | None = None
    _epoch = 0
    """Of the last batch."""
    _to_resume: dict[str, Any] | None = None
    _random_at_start: RandomStates | None = None
    """Of the first batch of a run that goes on."""
    _begun: list[TrainingData]
    """Where each training loader began its current epoch."""
    _begin_again: Callable[[], None] | None = None
    """Puts the loaders where the run goes on, until its first batch has begun."""
    _is_plain = False
    """Whether the run goes on from a checkpoint that does not say where its data stood."""
    _begun_in_place = False
    """Whether the loaders have begun where the run goes on."""
    _parallel: Alone | None = None

    # ------------------------------------------------------------------ while training

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self._random_at_start is not None:
            self._random_at_start.restore(self.root_device)
        self._to_resume = self._random_at_start = None
        self._note_step()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._begin_again = None
        self._note_epoch()

    def _note_epoch(self) -> None:
        if self._epochs.processed > self._epoch:
            self._epoch = self._epochs.processed
            for begun in self._begun:
                begun.next_epoch()

    def _before_fetch(self, original: Callable[[], None]) -> None:
        """Stands before Lightning's method of this name, which is called before each training batch (seen in 2.6.6)."""
        self._note_epoch()
        current = self._batches.current
        ready, current.ready = current.ready, current.processed  # a step with dataloader_iter has counted this batch
        if not self._trainer.fit_loop.epoch_loop._should_accumulate():
            self._note_step()
        current.ready = ready
        original()

    def _note_step(self) -> None:
        """Notes how things stand now."""
        module, trainer = self.lightning_module, self._trainer
        assert module is not None
        buffers = {}
        if trainer.accumulate_grad_batches > 1:
            buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
        self._last_step = _Step(RandomStates.now(self.root_device), self._batches.total.processed, buffers)

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    # ------------------------------------------------------------------ saving

    @property
    def _since_step(self) -> int:
        """Batches that were done since the last optimizer step, whose gradients are not in a checkpoint."""
        if self._last_step is None or not self._saves_training:
            return 0
        if self._between_batches and not self._trainer.fit_loop.epoch_loop._should_accumulate():
            return 0
        since = self._batches.total.processed - self._last_step.batches
        return since if 0 <= since < self._trainer.accumulate_grad_batches else 0

    @property
    def _between_batches(self) -> bool:
        return bool(self._batches.current.ready == self._batches.current.processed)

    @property
    def _batches(self) -> Any:
        return self._trainer.fit_loop.epoch_loop.batch_progress

    @property
    def _epochs(self) -> Any:
        return self._trainer.fit_loop.epoch_progress.current

    @property
    def _saves_training(self) -> bool:
        return self._last_step is not None and self._trainer.state.fn == TrainerFn.FITTING

    def _with_resume(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint with the state of data and random generators, taken back to the last optimizer step.

        Communication over the data ranks: one all-gather of their random states and of the loaders' own, as objects of
        about 10 kB.
        """
        if self._last_step is None and self._to_resume is not None:  # nothing was done since the run goes on
            return {**checkpoint, RESUME: self._to_resume}
        if not self._saves_training or "optimizer_states" not in checkpoint:
            return checkpoint
        assert self._last_step is not None
        batches, since = self._batches, self._since_step
        at_step = since == 0 and self._between_batches
        states = RandomStates.now(self.root_device) if at_step else self._last_step.random
        position = self._position(since)
        done, ended = batches.current.processed - since, position["epoch"] > self._epoch
        fetcher: Any = self._trainer.fit_loop._data_fetcher
        # Lightning fetches one batch ahead where it can't know by their number which is the last
        ahead = getattr(fetcher, "prefetch_batches", 0) > 0 and fetcher.length is None
        own = states.to_state(), [data.state(done, ended, ahead) for data in self._begun]
        every: list[Any] = [own]
        if self.num_data_ranks > 1:
            every = [None] * self.num_data_ranks
            dist.all_gather_object(every, own, self.data_group)
        loops = copy.deepcopy(checkpoint["loops"])
        if since:
            _take_back(loops, since)
        if self._ended_early:
            _reopen_epoch(loops)
        _leave_epoch_that_has_not_started(loops)
        random, loaders = (list(part) for part in zip(*every, strict=True))
        self._tell_of_other_orders(loaders)
        resume = {"random": random, "loaders": loaders, **position}
        plain = [data.plain_state(done, ended) for data in self._begun]
        if any(state is not None for state in plain):
            loops["fit_loop"]["state_dict"]["combined_loader"] = [state for state in plain if state is not None]
        return {**checkpoint, "loops": loops, RESUME: resume}

    def _tell_of_other_orders(self, loaders: list[list[Any]]) -> None:
        """Where the ranks' samplers drew apart; said at a save, which has gathered what each drew."""
        for number, data in enumerate(self._begun):
            if data.order is None:
                continue
            digests = {of_rank[number]["digest"] for of_rank in loaders if of_rank[number] is not None}
            if len(digests) > 1:
                kind = type(getattr(data.order.source, "sampler", data.order.source)).__name__
                rank_zero_warn(
                    f"the data ranks drew different orders from the {kind} of training loader {number}, so an epoch "
                    "repeats samples and leaves others out; seed what it draws from alike on all ranks, or let it draw "
                    "from a torch.Generator that is its attribute `generator`"
                )

    def _position(self, since: int) -> dict[str, Any]:
        """The epoch, and what was taken of it from each loader."""
        loop, batches = self._trainer.fit_loop, self._batches
        done = batches.current.processed - since
        here = {
            "num_data_ranks": self.num_data_ranks,
            "batches": done,
            "batch_sizes": [begun.batch_size for begun in self._begun],
        }
        if done >= loop.max_batches or (batches.is_last_batch and self._between_batches):
            return {**here, "epoch": self._epoch + 1, "taken": [0 for _ in self._begun], "batches": 0}
        return {**here, "epoch": self._epoch, "taken": self._taken(done)}

    def _taken(self, done: int) -> list[int]:
        """Of each loader, at a count of batches of this epoch, as Lightning's mode combines them."""
        combined = self._trainer.fit_loop._combined_loader
        assert combined is not None
        starts_over = combined._mode == "max_size_cycle"
        return [data.taken(done - data.done, starts_over) for data in self._begun]

    @property
    def _ended_early(self) -> bool:
        """Whether Lightning ended an epoch within, at ``max_steps``, say; a run that goes on finishes it first."""
        loop, batches = self._trainer.fit_loop, self._batches
        is_within = batches.current.processed < loop.max_batches and not batches.is_last_batch
        return is_within and self._epochs.processed > self._epoch

    def _buffers_at_step(self, state: dict[str, Any]) -> dict[str, Any]:
        """A module's state dict, with the buffers of the last optimizer step.

        Communication: none, or what :func:`average_buffers` does.
        """
        step, module = self._last_step, self.lightning_module
        assert module is not None
        if step is None or not step.buffers or not self._since_step:
            return state
        buffers = dict(module.named_buffers())
        now = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(step.buffers[name])
            self._settle()
            then = {name: buffer.detach().clone() for name, buffer in buffers.items() if name in state}
            for name, buffer in buffers.items():
                buffer.copy_(now[name])
        return {**state, **then}

    def _settle(self) -> None:
        """Makes buffers equal on all data ranks before they are used or saved."""
        if self.data_group is not None and self.lightning_module is not None:
            module = self.lightning_module
            callbacks = [] if module._trainer is None else module.trainer.callbacks  # type: ignore[attr-defined]
            for one in (module, *copies_of(module, callbacks)):
                average_buffers(one, self.data_group)
            if self._parallel is not None:
                self._parallel.share_buffers()

    # ------------------------------------------------------------------ resuming

    def _resume_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Notes what a checkpoint says, for the loaders and the generators of the run that begins."""
        if self._trainer.state.fn == TrainerFn.FITTING:
            self._to_resume = checkpoint.get(RESUME)
            self._is_plain = self._to_resume is None

    @override
    def setup_environment(self) -> None:
        self._begun, self._last_step, self._to_resume, self._epoch = [], None, None, 0
        self._random_at_start = self._begin_again = None
        self._is_plain = self._begun_in_place = False
        super().setup_environment()

    @override
    def _own_dataloaders(self, trainer: pl.Trainer) -> None:
        super()._own_dataloaders(trainer)
        loop: Any = trainer.fit_loop
        if "_load_combined_loader_states" not in vars(loop):
            loop._load_combined_loader_states = partial(self._begin_loaders, loop._load_combined_loader_states)
            loop.setup_data = partial(self._set_up_data, loop.setup_data)
            loop.epoch_loop._on_before_fetch = partial(self._before_fetch, loop.epoch_loop._on_before_fetch)
            loop.epoch_loop.on_run_start = partial(self._before_epoch, loop.epoch_loop.on_run_start)

    def _before_epoch(self, original: Callable[[Any], None], data_fetcher: Any) -> None:
        """Stands before Lightning's method of this name, which begins the loaders anew for all epochs but the first of
        a run; a run that goes on from the validation at an epoch's end has begun them for that one (seen in 2.6.6).
        """
        loop = self._trainer.fit_loop
        if self._begin_again is not None and not loop.is_resuming and not loop.epoch_loop.restarting:
            self._begin_again()
        original(data_fetcher)

    def _set_up_data(self, original: Callable[[], None]) -> None:
        """Stands before Lightning's method of this name, which fetches a first batch of loaders without a length."""
        loop = self._trainer.fit_loop
        if self._goes_on and not self._begun_in_place:
            loop._combined_loader = None  # that somebody asked for (estimated_stepping_batches) before
        original()
        saved = self._to_resume if self._goes_on else None
        if saved is not None and self._random_at_start is None:
            # within an epoch that batch was there already when the run was saved
            self._random_at_start = (
                self._saved_random(saved) if saved["batches"] else RandomStates.now(self.root_device)
            )

    @property
    def _goes_on(self) -> bool:
        """Whether the training goes on from a checkpoint whose progress Lightning has restored by now."""
        return (self._to_resume is not None or self._is_plain) and self._trainer.fit_loop._loaded_from_state_dict

    def _begin_loaders(self, original: Callable[[], None]) -> None:
        """Stands before Lightning's method of this name: loaders are there, and not yet asked (seen in 2.6.6)."""
        loop = self._trainer.fit_loop
        combined, self._begin_again = loop._combined_loader, None
        assert combined is not None
        saved = self._to_resume if self._goes_on else None
        self._begun_in_place |= self._goes_on
        has_states = bool(loop._combined_loader_states_to_load)
        if saved is None:
            original()
        else:
            loop._combined_loader_states_to_load = []  # which plain Lightning would go by
        self._epoch = self._epochs.processed if saved is None else saved["epoch"]
        self._begun = [
            TrainingData(loader, self.num_data_ranks, self.data_rank, self._places_kept)
            for loader in combined.flattened
        ]
        for data in self._begun:
            data.begin(self._epoch)
        if saved is not None:
            self._begin_where(saved)
            self._saved_random(saved).restore(self.root_device)
        elif self._goes_on:
            self._begin_after_plain(has_states)
        limits, shown = combined.limits, combined.flattened
        combined.flattened = [data.loader for data in self._begun]
        combined.limits = limits
        self._show(combined, shown)

    def _begin_after_plain(self, in_place: bool) -> None:
        """Begins the loaders within an epoch of a run under plain Lightning, which says how many batches were done.

        A step is taken to have had as many samples as here. Plain Lightning itself would go on with the first samples.

        Args:
            in_place: Lightning has put loaders that have states where they were.
        """
        self._is_plain = False
        progress, combined = self._batches, self._trainer.fit_loop._combined_loader
        assert combined is not None
        done, epoch = progress.current.processed, self._epochs.processed
        if not done or progress.is_last_batch or done >= max(combined.limits or [math.inf]):
            return
        went_on = [data.skip(done, in_place) for data in self._begun]
        for data in self._begun:
            data.done = done
        if all(went_on):
            rank_zero_info(
                f"The checkpoint was written by plain Lightning within epoch {epoch}: this run goes on after {done} "
                "batches, as large as those of this layout together"
            )
            return
        rank_zero_warn(
            f"the checkpoint was written by plain Lightning after {done} batches of epoch {epoch}, in an order that "
            "can't be drawn again, so this epoch begins anew; save at the end of an epoch, or give the loader an order "
            "of its own (a sampler with set_epoch)"
        )
        for data in self._begun:
            data.begin(epoch)
            data.done = 0
        # where a checkpoint was written at the end of a batch, Lightning counts it when the loop is reset
        progress.current.completed -= done
        progress.current.ready = progress.current.started = progress.current.processed = 0

    def _places_kept(self) -> int:
        return int(self._trainer.accumulate_grad_batches) + 2

    def _begin_where(self, saved: dict[str, Any]) -> None:
        if len(saved["taken"]) != len(self._begun):
            raise ValueError(
                f"the checkpoint was written within a training on {len(saved['taken'])} loaders, and this run has "
                f"{len(self._begun)}; train on as many, or load the weights alone"
            )
        same_ranks = saved["num_data_ranks"] == self.num_data_ranks
        self._begin_at(saved, same_ranks)
        if not saved["batches"]:
            self._begin_again = partial(self._begin_at, saved, same_ranks)
        same_batches = saved["batch_sizes"] == [data.batch_size for data in self._begun]
        if saved["batches"] and not (same_ranks and same_batches):
            self._count_from(max(self._begun, key=lambda data: data.left))
        for data in self._begun:
            data.done = self._batches.current.processed if saved["batches"] else 0
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")

    def _begin_at(self, saved: dict[str, Any], same_ranks: bool) -> None:
        trainer: Any = self._trainer
        every = trainer.reload_dataloaders_every_n_epochs
        are_new = every and not saved["batches"] and saved["epoch"] % every == 0
        for number, data in enumerate(self._begun):
            states = None if are_new else [of_rank[number] for of_rank in saved["loaders"]]
            data.begin(saved["epoch"], saved["taken"][number], states, same_ranks)

    def _count_from(self, longest: TrainingData) -> None:
        """Lets Lightning's count of batches end with what is left of the epoch, under other ranks or batch sizes."""
        combined, current = self._trainer.fit_loop._combined_loader, self._batches.current
        assert combined is not None
        size = max(combined.limits or [math.inf])
        if not math.isfinite(size):
            return
        is_limited = size < len(longest.loader)  # limit_train_batches
        done = min(int(size), longest.before) if is_limited else max(0, int(size - longest.left))
        unfinished = current.processed - current.completed
        current.ready = current.started = current.processed = done
        current.completed = max(0, done - unfinished)

    def _saved_random(self, saved: dict[str, Any]) -> RandomStates:
        """Of this data rank; one that the saved run did not have draws on from another one's, apart."""
        states = saved["random"]
        random = RandomStates.from_state(states[self.data_rank % len(states)])
        if self.data_rank < len(states):
            return random
        with kept_random_states(self.root_device):
            random.restore(self.root_device)
            seed_generators(int(torch.randint(2**31, ())) + self.data_rank, self.root_device)
            return RandomStates.now(self.root_device)


def _take_back(loops: dict[str, Any], batches: int) -> None:
    """Sets Lightning's states of the loops to what they were so many batches before, when the last one had ended."""
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        before = progress[part]["processed"] - batches
        progress[part] = dict.fromkeys(progress[part], before)


def _leave_epoch_that_has_not_started(loops: dict[str, Any]) -> None:
    """Sets Lightning's states of the loops, as ``on_train_epoch_start`` sees them, to those at the end of the epoch
    before: it would take that one's batches for those of the next (seen in 2.6.6).
    """
    for part in ("total", "current"):
        progress = loops["fit_loop"]["epoch_progress"][part]
        if progress["ready"] > progress["started"]:
            progress["ready"] = progress["started"]


def _reopen_epoch(loops: dict[str, Any]) -> None:
    """Sets Lightning's states of the loops to an epoch that goes on."""
    progress = loops["fit_loop"]["epoch_progress"]
    for part in ("total", "current"):
        progress[part]["processed"] = progress[part]["completed"] = progress[part]["started"] - 1
