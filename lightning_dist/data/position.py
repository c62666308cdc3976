"""Where a training loader is in its epoch, and how it goes on from there on the same or on other data ranks."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from lightning_dist.compat.fabric import Stateful
from lightning_dist.compat.litdata import streaming_datasets
from lightning_dist.compat.torch import StandsForLoader
from lightning_dist.data.global_batch import Division
from lightning_dist.data.samplers import loader_seed
from lightning_dist.data.sharding import distributed_sampler, items_of_batch
from lightning_dist.data.streams import DistributedStream
from lightning_dist.random_states import CPU, RandomStates, kept_random_states


class Resumable(StandsForLoader):
    """A loader whose samples its owner shards: iterable data, a ``DistributedSampler``, or no ``DataLoader`` at all.

    It goes on by its own state where it, or an iterable data set without workers, has ``state_dict`` and
    ``load_state_dict``; else by leaving out batches, which reads them once more.

    Args:
        loader: the user's.
        kept: states of so many last batches: Lightning fetches one ahead, and gradients of some may add up.
    """

    def __init__(self, loader: Any, kept: Callable[[], int]) -> None:
        super().__init__(loader)
        self._skip, self._kept = 0, kept
        self._is_litdatas = next(streaming_datasets(getattr(loader, "dataset", None)), None) is not None
        self._goes_on = False
        """Whether the next iteration does, by the owner's state."""
        self._states: dict[int, Any] = {}
        """The owner's, after a number of batches."""
        self._before_next: dict[int, RandomStates] = {}
        """The generators', when the batch after a number of them was asked for."""
        self._random: dict[str, Any] | None = None
        dataset = getattr(loader, "dataset", None)
        owners = [loader] if getattr(loader, "num_workers", 0) else [loader, dataset]
        self._owner: Any = next(filter(_has_state, owners), None)
        self.keeps_its_place = self._owner is not None
        """Whether it has a state, by which it goes on."""
        # a DataLoader makes an iterator for each epoch, so what lasts is in the data set
        inner = loader.loader if isinstance(loader, DistributedStream) else loader
        lasting = dataset if isinstance(inner, DataLoader) else loader
        self._lasting: Any = lasting if _has_state(lasting) else None
        self._lasted: Any = None
        """The state of that when the iteration began."""

    def begin(self, epoch: int, data_rank: int) -> None:
        """The next iteration is that of an epoch: its order, and the seed of its workers."""
        self._skip = 0
        for sampler in (getattr(self.loader, "sampler", None), getattr(self.loader, "batch_sampler", None)):
            if epoch and callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(epoch)
        if epoch and self._is_litdatas:
            self.loader.current_epoch = epoch  # LitData's loader counts those it has begun
        generator = getattr(self.loader, "generator", None)
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
            self._goes_on = True
            self._states = {0: copy.deepcopy(state["owner"])}
        self._random = None if state is None else state["random"]

    def go_on_after_epoch(self, state: Any) -> None:
        """The next iteration begins as after an epoch of an earlier run, by :meth:`state_after_epoch`."""
        lasting = None if state is None else state.get("lasting")
        if self._lasting is not None and lasting is not None:
            self._lasting.load_state_dict(lasting)

    def state_after_epoch(self) -> Any:
        """What lasts from one epoch to the next."""
        return {"lasting": None if self._lasting is None else copy.deepcopy(self._lasting.state_dict())}

    def state_after(self, batches: int, ahead: bool) -> Any:
        """Where the loader stood after so many batches of this iteration, and the generators if it had read on."""
        random = self._before_next.get(batches) if ahead else None
        state = self._random if random is None else random.to_state()
        place = {"owner": self._states.get(batches), "random": state}
        return place if batches else place | (self._lasted or self.state_after_epoch())

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip, self._lasted = self._skip, 0, self.state_after_epoch()
        if self._is_litdatas and not self._goes_on:
            self.loader.restore = False  # it is reset by who asks for more than there is, which Lightning does not
        self._goes_on = False
        batches = iter(self.loader)
        with kept_random_states(CPU):
            for _ in range(skip):
                next(batches, None)
        self._states = {number: state for number, state in self._states.items() if not number}
        self._before_next.clear()
        for number in itertools.count():
            random, self._random = self._random, None
            self._before_next[number] = RandomStates.now(CPU) if random is None else RandomStates.from_state(random)
            try:
                batch = next(batches) if random is None else _drawn_from(random, batches)
            except StopIteration:
                return
            if self._owner is not None:
                self._states[number + 1] = copy.deepcopy(self._owner.state_dict())
            for states in (self._states, self._before_next):
                for old in [before for before in states if before < number - self._kept()]:
                    del states[old]
            yield batch

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name in ("loader", "state_dict", "load_state_dict"):
            raise AttributeError(name)
        return getattr(self.loader, name)


def _has_state(owner: Any) -> bool:
    """Whether it tells its state by itself; a data set of LitData wants to be told by its loader where it is."""
    if not hasattr(owner, "state_dict") or not hasattr(owner, "load_state_dict"):
        return False
    try:
        parameters = inspect.signature(owner.state_dict).parameters.values()
    except (TypeError, ValueError):  # of a method that is not Python's
        return True
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return all(p.default is not inspect.Parameter.empty or p.kind in variable for p in parameters)


def _drawn_from(random: dict[str, Any], batches: Iterator[Any]) -> Any:
    """The next batch, as made from these states of the generators, which are then as they were before."""
    with kept_random_states(CPU):
        RandomStates.from_state(random).restore(CPU)
        return next(batches)


def keeps_a_place(state: Any) -> bool:
    """Whether a loader's state, of :meth:`TrainingData.state`, is one that no other data rank has."""
    return state is not None and any(state.get(name) is not None for name in ("owner", "lasting"))


class TrainingData:
    """A training loader, as Lightning prepared it: what was taken of it in this epoch, and where it begins.

    Args:
        num_data_ranks, data_rank: the number of data ranks that take from it, and this one.
        kept: of the last batches of which a place may be asked for.
    """

    def __init__(self, loader: Any, num_data_ranks: int, data_rank: int, kept: Callable[[], int]) -> None:
        self.order, self._user_loader = distributed_sampler(loader), loader
        self.loader = loader if self.order is not None else Resumable(loader, kept)
        self.batch_size = items_of_batch(loader)
        """This rank's, in what is sharded."""
        self.done = 0
        """Lightning's count of batches when the run began this epoch."""
        self._num_data_ranks, self._data_rank, self._start = num_data_ranks, data_rank, 0
        self._step = self.batch_size * num_data_ranks

    def begin(self, epoch: int, taken: int = 0, states: list[Any] | None = None, same_ranks: bool = True) -> None:
        """The next iteration is that of an epoch, of which all ranks together took some already.

        Args:
            epoch: counted from 0.
            taken: samples, or batches where those are sharded or nothing says how large they are.
            states: of the loader on each data rank that there was.
            same_ranks: there are as many now.

        Raises:
            ValueError: the loader's place can't be found for this number of data ranks, or size of batches.
        """
        self._start = taken
        if self.order is not None:
            if epoch or self.order.epoch:  # of the first, Lightning tells the samplers itself
                self.order.set_epoch(epoch)
            self.order.taken = taken
            self.order.go_on(next((state for state in states or () if state is not None), None))
            return
        # ranks that read the same stream draw alike
        self.loader.begin(epoch, 0 if isinstance(self._user_loader, DistributedStream) else self._data_rank)
        state = states[self._data_rank] if states is not None and same_ranks else None
        if not taken:
            self.loader.go_on_after_epoch(state)
            return
        if taken % self._step:
            raise ValueError(
                f"all ranks together had taken {taken} samples of the epoch, from loaders that shard them themselves; "
                f"with {self._num_data_ranks} data ranks and batches of {self.batch_size} that is between two batches. "
                f"Choose them so that {taken} is a multiple of their product, or resume from the end of an epoch"
            )
        self.loader.skip(taken // self._step, state)

    def skip(self, batches: int, in_place: bool) -> bool:
        """The next iteration goes on after so many batches of this rank, of which a run under plain Lightning says no
        more than their number; False where their order can't be drawn again, and it begins with the first.

        It can where samples come one after the other, where their order hangs on the epoch (``set_epoch``), and for
        iterable data, which is read once more; ``in_place``, plain Lightning has put loaders with states there.
        """
        if in_place and isinstance(self._user_loader, Stateful):
            self._start = int(min(batches * self._step, self._size))
            return True
        if self.order is not None:
            source = getattr(self.order.source, "sampler", self.order.source)
            if not isinstance(source, SequentialSampler) and not callable(getattr(source, "set_epoch", None)):
                return False
            self._start = self.order.taken = int(min(batches * self._step, self._size))
            return True
        if self.loader.keeps_its_place or isinstance(getattr(self._user_loader, "sampler", None), RandomSampler):
            return False
        self._start = batches * self._step
        self.loader.skip(batches, None)
        return True

    def plain_state(self, done: int, ended: bool) -> Any:
        """What plain Lightning saves of a loader that has ``state_dict``, see :meth:`state`; None of others."""
        if not isinstance(self._user_loader, Stateful):
            return None
        place = None if ended or self.order is not None else self.loader.state_after(done - self.done, False)["owner"]
        return copy.deepcopy(self._user_loader.state_dict()) if place is None else place

    @property
    def is_even(self) -> bool:
        """Whether every data rank has as many batches, since the strategy shards them."""
        return self.order is not None or isinstance(self._user_loader, DistributedStream)

    def next_epoch(self) -> None:
        """Another epoch has begun, from its start."""
        self._start = self.done = 0

    @property
    def _size(self) -> float:
        """Size of an epoch, in what is sharded."""
        if self.order is not None:
            return sized_len(self.order.source) or math.inf
        size = sized_len(self.loader)
        return math.inf if size is None else size * self._step

    @property
    def left(self) -> float:
        """Batches of this rank that were left of the epoch when it began here."""
        return self._batches_of(self._size - self._start)

    @property
    def before(self) -> int:
        """Batches of this rank that were taken of the epoch when it began here, as they are now."""
        return math.ceil(self._start / self._step)

    def _batches_of(self, items: float) -> float:
        if not math.isfinite(items):
            return items
        batches = getattr(self.loader, "batch_sampler", None)
        drops = getattr(batches, "drop_last", False)
        each = math.ceil(items / self._num_data_ranks) if self.order is None else self.order.of_each(int(items))
        if self.order is not None and (count := getattr(batches, "batches_of", None)) is not None:
            return count(each)
        return each // self.batch_size if drops else math.ceil(each / self.batch_size)

    def weight(self, division: Division, given: int) -> float:
        """See :meth:`Division.weight`, of this rank's next batch after so many since it began here; 1 where nothing
        says how many items an epoch has.
        """
        if self.order is not None:
            size, drops = sized_len(self.order.source), self.order.drops_last
        else:
            each = sized_len(getattr(self._user_loader, "sampler", None))
            size, drops = each and each * self._num_data_ranks, bool(getattr(self._user_loader, "drop_last", False))
        return (
            1.0 if size is None else division.weight(self._start // self._step + given, size, drops, self.order is None)
        )

    def taken(self, given: int, starts_over: bool) -> int:
        """By all ranks of the epoch, after so many batches of this rank since it began here.

        ``starts_over`` where there are none left, as Lightning lets shorter loaders do beside longer ones.
        """
        start = self._start
        if starts_over and given > self.left:
            given, start = int((given - self.left) % self._batches_of(self._size)), 0
        return int(min(start + given * self._step, self._size))

    def samples_of(self, first: int, last: int) -> list[Any] | None:
        """The indices of this rank's samples in batches of this epoch, by Lightning's count of them; None where the
        loader is not sharded by the strategy, or has come to its end and begun again.
        """
        if self.order is None:
            return None
        items = self.order.mine[max(0, first - self.done) * self.batch_size : (last + 1 - self.done) * self.batch_size]
        return [index for item in items for index in (item if isinstance(item, list) else [item])] or None

    def state(self, done: int, ended: bool, ahead: bool) -> Any:
        """The loader's own state at Lightning's count of batches; where the strategy shards it, that of its order.

        The next batch is the first of another epoch (``ended``), or fetched before it is asked for (``ahead``).
        """
        if self.order is not None:
            return self.order.state()
        return self.loader.state_after_epoch() if ended else self.loader.state_after(done - self.done, ahead)
