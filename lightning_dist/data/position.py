"""Where a training loader is in its epoch, and how it goes on from there on the same or on other data ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len

from lightning_dist.data.dealing import dealt_by, items_of_batch, loader_seed
from lightning_dist.randomness import CPU, RandomStates, kept_random_states


class TrainingData:
    """A training loader: what was taken of it in this epoch, and where it begins.

    Args:
        loader: as Lightning prepared it.
        num_data_ranks: that take from it.
        data_rank: this one.
    """

    def __init__(self, loader: Any, num_data_ranks: int, data_rank: int) -> None:
        self.dealt = dealt_by(loader)
        self.loader = loader if self.dealt is not None else Resumable(loader)
        self.batch_size = items_of_batch(loader) if self.dealt is not None else 1
        self.done = 0
        """Lightning's count of batches when the run began this epoch."""
        self._num_data_ranks, self._data_rank, self._start = num_data_ranks, data_rank, 0

    def begin(self, epoch: int, taken: int = 0, states: list[Any] | None = None, same_ranks: bool = True) -> None:
        """The next iteration is that of an epoch, of which all ranks together took some already.

        Args:
            epoch: counted from 0.
            taken: samples, or batches where those are dealt.
            states: of the loader on each data rank that there was.
            same_ranks: there are as many now.

        Raises:
            ValueError: the loader's place can't be found for this number of data ranks.
        """
        self._start = taken
        if self.dealt is not None:
            self.dealt.set_epoch(epoch)
            self.dealt.taken = taken
            self.dealt.go_on(None if states is None else states[0])
            return
        self.loader.begin(epoch, self._data_rank)
        if taken:
            state = states[self._data_rank] if states is not None and same_ranks else None
            self.loader.skip(taken // self._num_data_ranks, state)

    def next_epoch(self) -> None:
        """Another epoch has begun, from its start."""
        self._start = self.done = 0

    @property
    def _step(self) -> int:
        return self.batch_size * self._num_data_ranks

    @property
    def _size(self) -> float:
        """Of an epoch, in what is dealt."""
        if self.dealt is not None:
            return len(self.dealt.source)
        size = sized_len(self.loader)
        return math.inf if size is None else size * self._num_data_ranks

    @property
    def left(self) -> float:
        """Batches of this rank that were left of the epoch when it began here."""
        return self._batches_of(self._size - self._start)

    @property
    def before(self) -> int:
        """Batches of this rank that were taken of the epoch when it began here, as they are now."""
        return math.ceil(self._start / self._step)

    def _batches_of(self, items: float) -> float:
        batches = items / self._num_data_ranks / self.batch_size
        if not math.isfinite(batches):
            return batches
        drops = getattr(getattr(self.loader, "batch_sampler", None), "drop_last", False)
        each = math.ceil(items / self._num_data_ranks)
        return each // self.batch_size if drops else math.ceil(each / self.batch_size)

    def taken(self, done: int) -> int:
        """By all ranks of the epoch, at a count of batches; a loader that is shorter than others starts over."""
        given, start = done - self.done, self._start
        if given > self.left:
            given, start = int((given - self.left) % self._batches_of(self._size)), 0
        return int(min(start + given * self._step, self._size))

    def state(self, done: int) -> Any:
        """Of the loader itself after so many batches; where batches or samples are dealt, of their order."""
        return self.dealt.state() if self.dealt is not None else self.loader.state_after(done - self.done)


class Resumable:
    """A loader whose samples its owner deals: iterable data, a ``DistributedSampler``, or no ``DataLoader`` at all.

    It goes on by its own state where it, or an iterable data set without workers, has ``state_dict`` and
    ``load_state_dict``; else by leaving out batches, which reads them once more.

    Args:
        loader: the user's.
    """

    _KEPT = 64
    """States of the last batches: Lightning fetches one ahead, and gradients of some may add up."""

    def __init__(self, loader: Any) -> None:
        self._loader, self._skip = loader, 0
        self._states: dict[int, Any] = {}
        """Of the owner, after a number of batches."""
        self._before_next: dict[int, RandomStates] = {}
        """Of the generators, when the batch after a number of them was asked for."""
        self._random: dict[str, Any] | None = None
        dataset = getattr(loader, "dataset", None)
        owners = [loader] if getattr(loader, "num_workers", 0) else [loader, dataset]
        self._owner: Any = next((o for o in owners if hasattr(o, "state_dict") and hasattr(o, "load_state_dict")), None)

    def begin(self, epoch: int, data_rank: int) -> None:
        """The next iteration is that of an epoch: its order, and the seed of its workers."""
        self._skip = 0
        for sampler in (getattr(self._loader, "sampler", None), getattr(self._loader, "batch_sampler", None)):
            if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(epoch)
        generator = getattr(self._loader, "generator", None)
        if isinstance(generator, torch.Generator) and generator.initial_seed() == loader_seed(data_rank):
            generator.manual_seed(generator.initial_seed())
            for _ in range(epoch):  # each iteration draws one
                torch.empty((), dtype=torch.int64).random_(generator=generator)

    def skip(self, batches: int, state: Any) -> None:
        """The next iteration goes on after so many batches, by the state if there is one.

        Raises:
            ValueError: the loader has states, and this rank has none.
        """
        if self._owner is None:
            self._skip = batches
        elif state is None:
            raise ValueError(
                f"the {type(self._owner).__name__} has a state for each data rank, and the checkpoint was written "
                "within an epoch under another number of them; resume with as many, or from the end of an epoch"
            )
        else:
            self._owner.load_state_dict(state["owner"])
        self._random = None if state is None else state["random"]

    def state_after(self, batches: int) -> Any:
        """Where the loader stood after so many batches of this iteration, and the generators if it has read on."""
        random = self._before_next.get(batches)
        return {"owner": self._states.get(batches), "random": None if random is None else random.to_state()}

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip = self._skip, 0
        batches = iter(self._loader)
        with kept_random_states(CPU):
            for _ in range(skip):
                next(batches, None)
        self._states.clear()
        self._before_next.clear()
        for number in itertools.count():
            random, self._random = self._random, None
            self._before_next[number] = RandomStates.now(CPU) if random is None else RandomStates.from_state(random)
            try:
                batch = next(batches) if random is None else _drawn_from(random, batches)
            except StopIteration:
                return
            if self._owner is not None:
                self._states[number + 1] = self._owner.state_dict()
            for states in (self._states, self._before_next):
                states.pop(number - self._KEPT, None)
            yield batch

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def _iterator(self) -> Any:
        """A DataLoader's own, by which Lightning shuts its workers down."""
        return getattr(self._loader, "_iterator", None)

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        if hasattr(self._loader, "_iterator"):
            self._loader._iterator = value

    def __getattr__(self, name: str) -> Any:
        if name in ("_loader", "state_dict", "load_state_dict"):
            raise AttributeError(name)
        return getattr(self._loader, name)


def _drawn_from(random: dict[str, Any], batches: Iterator[Any]) -> Any:
    """The next batch, as made from these states of the generators, which are then as they were before."""
    with kept_random_states(CPU):
        RandomStates.from_state(random).restore(CPU)
        return next(batches)
