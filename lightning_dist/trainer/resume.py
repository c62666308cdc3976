"""Where a training stands between two steps, so that one that goes on from a checkpoint does so as if never stopped.

[Note: what a checkpoint is the state of]
The last optimizer step. Between two of them gradients add up, which no checkpoint holds: one that is written there
says how things stood at the step before, in random states, buffers and progress, and a resumed run takes those
microsteps again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_dist.collectives import gather_objects
from lightning_dist.compat import lightning as private
from lightning_dist.data import TrainingData
from lightning_dist.patches import Patches
from lightning_dist.random_states import RandomStates, kept_random_states, seed_generators
from lightning_dist.ranks import LayoutRanks
from lightning_dist.trainer.global_batch import GlobalBatch
from lightning_dist.trainer.loaders import Loaders
from lightning_dist.trainer.resume_entry import RESUME, Place, Step, copied, joined, set_back


class Resume:
    """Knows where in its data and its random streams a fit is; writes it into checkpoints, and goes on from there.

    ``share_buffers`` makes the module's buffers equal on all ranks, before they are saved.
    """

    def __init__(
        self, ranks: LayoutRanks, loaders: Loaders, batch: GlobalBatch, share_buffers: Callable[[], None]
    ) -> None:
        self._ranks, self._loaders, self._batch, self._share_buffers = ranks, loaders, batch, share_buffers
        self._trainer: Any = None
        self._patches = Patches()
        self.training_data: list[TrainingData] = []
        """Where each training loader began its current epoch."""
        self.last_step: Step | None = None
        """How things stood at the last optimizer step of the run."""
        self._epoch = 0
        """The epoch of the last batch."""
        self._to_resume: dict[str, Any] | None = None
        self._random_at_start: RandomStates | None = None
        """The generators at the first batch of a run that goes on."""
        self._begin_again: Callable[[], None] | None = None
        """Puts the loaders where the run goes on, until its first batch has begun."""
        self._is_plain = self._begun_in_place = False
        """Whether the checkpoint does not say where its data stood; whether the loaders have begun where it goes on."""
        self._saves_at: dict[str, Any] = {}
        self._random_of_save: RandomStates | None = None
        """While the fit saves where it leaves, its place, and the generators that count instead of those of now."""
        self._place: tuple[Place, Any] | None = None
        """Where this run goes on, and with what its epoch has logged, until it has."""

    def attach(self, trainer: pl.Trainer, patches: Patches) -> None:
        """A run begins: from here on its loaders begin where it goes on, and each batch is noted."""
        self.training_data, self.last_step, self._to_resume, self._epoch = [], None, None, 0
        self._random_at_start = self._begin_again = None
        self._is_plain = self._begun_in_place = False
        self._place = None
        self._trainer, self._patches = trainer, patches
        loop = trainer.fit_loop
        patches.wrap(loop, private.LOAD_LOADER_STATES, self._begin_loaders)
        patches.wrap(loop, "setup_data", self._set_up_data)
        patches.wrap(loop.epoch_loop, private.BEFORE_FETCH, self._before_fetch)
        patches.wrap(loop.epoch_loop, "on_run_start", self._before_epoch)

    def is_even(self) -> bool:
        """Whether each training batch has as many samples on every data rank, as all of them know."""
        return all(data.is_even for data in self.training_data)

    def samples_of(self, first: int, last: int) -> list[Any] | None:
        """Indices of this rank's samples in batches ``first`` to ``last`` of the epoch that runs, of one loader or of
        several one after the other; None where the strategy does not shard them. Communication: none.
        """
        every = [data.samples_of(first, last) for data in self.training_data]
        return None if None in every else [index for samples in every for index in samples or ()]

    def on_train_start(self) -> None:
        """Hooks have drawn what they draw before the first batch."""
        if self._random_at_start is not None:
            self._random_at_start.restore(self._ranks.device)
        self._to_resume = self._random_at_start = None
        self._batch.on_train_start()
        self._note_step()

    def on_train_batch_start(self) -> None:
        """A batch begins, so nothing of the end of its epoch has been done."""
        if self._trainer.fit_loop.restarting:
            private.end_restart(self._trainer.fit_loop)
        self._begin_again = None
        self._note_epoch()

    def weight_of_batch(self) -> float:
        """What the loss of the batch that runs counts, see :meth:`~lightning_dist.data.Division.weight`."""
        division = self._batch.division
        if division is None or len(self.training_data) != 1:
            return 1.0
        data = self.training_data[0]
        return data.weight(division, self._batches.current.ready - 1 - data.done)

    def _note_epoch(self) -> None:
        if (epoch := self._epochs.processed) > self._epoch:
            self._epoch = epoch
            for data in self.training_data:
                data.next_epoch()

    def _before_fetch(self, original: Callable[[], None]) -> None:
        """Wraps Lightning's method that is called before each training batch is asked for."""
        self._note_epoch()
        current = self._batches.current
        ready, current.ready = current.ready, current.processed  # a step with dataloader_iter has counted this batch
        if not private.accumulates(self._trainer):
            self._note_step()
        current.ready = ready
        original()

    def _note_step(self) -> None:
        buffers = {}
        if self._trainer.accumulate_grad_batches > 1:
            module = self._trainer.lightning_module
            buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
        self.last_step = Step(RandomStates.now(self._ranks.device), self._batches.total.processed, buffers)

    @property
    def since_step(self) -> int:
        """Batches that were done since the last optimizer step, whose gradients are not in a checkpoint."""
        if self.last_step is None or not self._saves_training:
            return 0
        if self._between_batches and not private.accumulates(self._trainer):
            return 0
        since = self._batches.total.processed - self.last_step.batches
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
        return self.last_step is not None and self._trainer.state.fn == TrainerFn.FITTING

    def added_to(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint with the state of data and random generators, taken back to the last optimizer step.

        Communication: one all-gather of those over the data ranks, as objects of about 10 kB.
        """
        if self.last_step is None and self._to_resume is not None:  # nothing was done since the run goes on
            return {**checkpoint, RESUME: self._to_resume}
        if not self._saves_training or "optimizer_states" not in checkpoint:
            return checkpoint
        checkpoint, own = self.of_this_rank(checkpoint)
        every = gather_objects(own, self._ranks.data_group) if self._ranks.num_data_ranks > 1 else [own]
        self._tell_of_other_orders([of_rank["loaders"] for of_rank in every])
        return {**checkpoint, RESUME: {**joined(every), **self._saves_at}}

    def of_this_rank(self, checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The checkpoint with the loops taken back to the last optimizer step, and what :func:`joined` makes an entry
        of it from: this rank's random states and place in its data. Nothing is communicated.
        """
        assert self.last_step is not None
        batches, since = self._batches, self.since_step
        at_step = since == 0 and self._between_batches
        now = self._random_of_save or RandomStates.now(self._ranks.device)
        states = now if at_step else self.last_step.random
        position = self._position(since)
        done, ended = batches.current.processed - since, position["epoch"] > self._epoch
        ahead = private.fetches_ahead(self._trainer.fit_loop)
        loaders = [data.state(done, ended, ahead) for data in self.training_data]
        own = {"random": states.to_state(), "loaders": loaders, "data_rank": self._ranks.data_rank, **position}
        loops = copied(checkpoint["loops"])
        set_back(loops, since, self._ended_early)
        states_of_loaders = (data.plain_state(done, ended) for data in self.training_data)
        if plain := [state for state in states_of_loaders if state is not None]:
            loops["fit_loop"]["state_dict"]["combined_loader"] = plain
        return {**checkpoint, "loops": loops}, own

    @contextmanager
    def saving_at(self, place: Place, random: RandomStates | None, logged: Any) -> Iterator[None]:
        """While it lasts, what is saved goes on at this place, with these generators if they are not as now, and with
        what the epoch has logged. Within an accumulation it goes on with the batch after the last optimizer step.
        """
        self._saves_at = {"place": (Place.BATCH if self.since_step else place).value, "logged": logged}
        self._random_of_save = random
        try:
            yield
        finally:
            self._saves_at, self._random_of_save = {}, None

    def take_place(self) -> tuple[Place, Any] | None:
        """Where the run goes on and what its epoch has logged, for its first batch; None from then on, and where
        Lightning knows.
        """
        place, self._place = self._place, None
        return place

    def _tell_of_other_orders(self, loaders: list[list[Any]]) -> None:
        """Where the ranks' samplers drew apart; said at a save, which has gathered what each drew."""
        for number, data in enumerate(self.training_data):
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
        loop, batches, loaders = self._trainer.fit_loop, self._batches, self.training_data
        done = batches.current.processed - since
        here = {"num_data_ranks": self._ranks.num_data_ranks, "batch_sizes": [data.batch_size for data in loaders]}
        if done >= loop.max_batches or (batches.is_last_batch and self._between_batches):
            return {**here, "epoch": self._epoch + 1, "taken": [0 for _ in loaders], "batches": 0}
        starts_over = private.mode_of(private.loaders_of(loop)) == "max_size_cycle"
        taken = [data.taken(done - data.done, starts_over) for data in loaders]
        return {**here, "epoch": self._epoch, "taken": taken, "batches": done}

    @property
    def _ended_early(self) -> bool:
        """Whether Lightning ended an epoch within, at ``max_steps``, say; a run that goes on finishes it first."""
        loop, batches = self._trainer.fit_loop, self._batches
        is_within = batches.current.processed < loop.max_batches and not batches.is_last_batch
        return is_within and self._epochs.processed > self._epoch

    def buffers_at_step(self, state: dict[str, Any]) -> dict[str, Any]:
        """A module's state dict, with the buffers of the last optimizer step, which may have to be made equal."""
        step = self.last_step
        if step is None or not step.buffers or not self.since_step:
            return state
        buffers = dict(self._trainer.lightning_module.named_buffers())
        now = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(step.buffers[name])
            self._share_buffers()
            then = {name: buffer.detach().clone() for name, buffer in buffers.items() if name in state}
            for name, buffer in buffers.items():
                buffer.copy_(now[name])
        return {**state, **then}

    def go_on_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Notes what a checkpoint says, for the loaders and the generators of the run that begins."""
        if self._trainer.state.fn == TrainerFn.FITTING:
            self._to_resume = checkpoint.get(RESUME)
            self._is_plain = self._to_resume is None
            saved = self._to_resume or {}
            self._place = (Place(saved["place"]), saved["logged"]) if "place" in saved else None

    def _before_epoch(self, original: Callable[[Any], None], data_fetcher: Any) -> None:
        """Wraps Lightning's method that begins the loaders anew for all epochs but the first of a run.

        One that goes on from the validation at an epoch's end has begun them for that one (seen in 2.6.6).
        """
        loop = self._trainer.fit_loop
        if self._begin_again is not None and not loop.is_resuming and not loop.epoch_loop.restarting:
            self._begin_again()
        epochs = loop.epoch_progress
        if epochs.current.started == epochs.current.processed:
            # the first epoch after a checkpoint of the last batch of one: left uncounted, a checkpoint of its own last
            # batch would be taken for one of the epoch before, and that epoch trained twice (seen in 2.6.6)
            epochs.increment_ready()
            epochs.increment_started()
        original(data_fetcher)

    def _set_up_data(self, original: Callable[[], None]) -> None:
        """Wraps Lightning's method that fetches a first batch of loaders without a length."""
        loop = self._trainer.fit_loop
        if self._goes_on and not self._begun_in_place:
            private.forget_loaders(loop)  # that somebody asked for (estimated_stepping_batches) before
        original()
        self._batch.after_data()
        if self._goes_on and self._is_between_epochs():
            private.end_restart(loop)  # Lightning would take the first batch of the next epoch for a whole one
        saved = self._to_resume if self._goes_on else None
        if saved is not None and self._random_at_start is None:
            # within an epoch that batch was there already when the run was saved
            within = bool(saved["batches"]) or saved.get("place") == Place.VALIDATION
            self._random_at_start = self._saved_random(saved) if within else RandomStates.now(self._ranks.device)

    @property
    def _goes_on(self) -> bool:
        """Whether the training goes on from a checkpoint whose progress Lightning has restored by now."""
        return (self._to_resume is not None or self._is_plain) and private.goes_on(self._trainer.fit_loop)

    def _is_between_epochs(self) -> bool:
        """Whether all that comes at the end of an epoch has been done, and nothing of the next."""
        epochs, batches = self._trainer.fit_loop.epoch_progress.total, self._batches
        is_whole = batches.is_last_batch or batches.current.processed >= self._trainer.fit_loop.max_batches
        return bool(
            is_whole and epochs.ready == epochs.completed > 0 and batches.total.ready == batches.total.completed
        )

    def _begin_loaders(self, original: Callable[[], None]) -> None:
        """Wraps Lightning's method that is called when loaders are there, and not yet asked."""
        loop = self._trainer.fit_loop
        combined, self._begin_again = private.loaders_of(loop), None
        saved = self._to_resume if self._goes_on else None
        self._begun_in_place |= self._goes_on
        has_states = private.has_loader_states(loop)
        if saved is None:
            original()
        else:
            private.forget_loader_states(loop)
        self._epoch = self._epochs.processed if saved is None else saved["epoch"]
        self.training_data = [
            TrainingData(loader, self._ranks.num_data_ranks, self._ranks.data_rank, self._places_kept)
            for loader in combined.flattened
        ]
        for data in self.training_data:
            data.begin(self._epoch)
        if saved is not None:
            self._begin_where(saved)
            self._saved_random(saved).restore(self._ranks.device)
        elif self._goes_on:
            self._begin_after_plain(has_states)
        limits, shown = combined.limits, combined.flattened
        combined.flattened = [data.loader for data in self.training_data]
        combined.limits = limits
        self._loaders.show(combined, shown)

    def _begin_after_plain(self, in_place: bool) -> None:
        """Begins the loaders within an epoch of a run under plain Lightning, which says how many batches were done.

        A step is taken to have had as many samples as here. Plain Lightning itself would go on with the first samples.
        ``in_place``: Lightning has put loaders that have states where they were.
        """
        self._is_plain = False
        progress, combined = self._batches, private.loaders_of(self._trainer.fit_loop)
        done, epoch = progress.current.processed, self._epochs.processed
        if not done or progress.is_last_batch or done >= max(combined.limits or [math.inf]):
            return
        went_on = [data.skip(done, in_place) for data in self.training_data]
        for data in self.training_data:
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
        for data in self.training_data:
            data.begin(epoch)
            data.done = 0
        # where a checkpoint was written at the end of a batch, Lightning counts it when the loop is reset
        progress.current.completed -= done
        progress.current.ready = progress.current.started = progress.current.processed = 0

    def _places_kept(self) -> int:
        return int(self._trainer.accumulate_grad_batches) + 2

    def _begin_where(self, saved: dict[str, Any]) -> None:
        if len(saved["taken"]) != len(self.training_data):
            raise ValueError(
                f"the checkpoint was written within a training on {len(saved['taken'])} loaders, and this run has "
                f"{len(self.training_data)}; train on as many, or load the weights alone"
            )
        same_ranks = saved["num_data_ranks"] == self._ranks.num_data_ranks
        self._begin_at(saved, same_ranks)
        if not saved["batches"]:
            self._begin_again = lambda: self._begin_at(saved, same_ranks)
        same_batches = saved["batch_sizes"] == [data.batch_size for data in self.training_data]
        if not (same_ranks and same_batches):
            longest = max(self.training_data, key=lambda data: data.left)
            self._count(saved["epoch"], self._done(longest) if saved["batches"] else None)
        for data in self.training_data:
            data.done = self._batches.current.processed if saved["batches"] else 0
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        self._patches.also(partial(_remove_filter, warnings.filters[0]))

    def _begin_at(self, saved: dict[str, Any], same_ranks: bool) -> None:
        every = self._trainer.reload_dataloaders_every_n_epochs
        are_new = every and not saved["batches"] and saved["epoch"] % every == 0
        for number, data in enumerate(self.training_data):
            states = None if are_new else [of_rank and of_rank[number] for of_rank in saved["loaders"]]
            data.begin(saved["epoch"], saved["taken"][number], states, same_ranks)

    def _done(self, longest: TrainingData) -> int:
        """Lightning's count of batches at which what is left of the epoch is left, with these ranks and batch sizes."""
        size = self._batches_of_epoch
        length = sized_len(longest.loader)
        if not math.isfinite(size):
            return longest.before
        is_limited = length is None or size < length  # limit_train_batches
        return min(int(size), longest.before) if is_limited else max(0, int(size - longest.left))

    @property
    def _batches_of_epoch(self) -> float:
        return max(private.loaders_of(self._trainer.fit_loop).limits or [math.inf])

    def _count(self, epoch: int, done: int | None) -> None:
        """Lets Lightning's counts of batches be those of epochs as long as they are with these ranks and batch sizes.

        Args:
            epoch: of the batch that is next.
            done: batches of it that are done; None where it has not begun, and what is counted is the one before.
        """
        size, current, total = self._batches_of_epoch, self._batches.current, self._batches.total
        if done is None and (not math.isfinite(size) or not current.processed):
            return
        before = epoch * int(size) if math.isfinite(size) else total.processed - current.processed
        done_of_all = before + (done or 0)
        done = int(size) if done is None else done
        for progress, processed in ((current, done), (total, done_of_all)):
            unfinished = progress.processed - progress.completed
            progress.ready = progress.started = progress.processed = processed
            progress.completed = max(0, processed - unfinished)

    def _saved_random(self, saved: dict[str, Any]) -> RandomStates:
        """The states of this data rank; one that the saved run did not have draws on from another one's, apart."""
        states, rank = saved["random"], self._ranks.data_rank
        if rank < len(states) and states[rank] is not None:
            return RandomStates.from_state(states[rank])
        random = RandomStates.from_state(next(state for state in states if state is not None))
        with kept_random_states(self._ranks.device):
            random.restore(self._ranks.device)
            seed_generators(int(torch.randint(2**31, ())) + rank, self._ranks.device)
            return RandomStates.now(self._ranks.device)


def _remove_filter(ignored: Any) -> None:
    with suppress(ValueError):  # somebody else may have reset the filters
        warnings.filters.remove(ignored)  # type: ignore[attr-defined]
