"""Where a training loader is in its epoch, and how it goes on from there on the same or on other data ranks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.data import sized_len
from torch.utils.data import RandomSampler, SequentialSampler

from lightning_dist.compat.fabric import Stateful
from lightning_dist.data.global_batch import Division
from lightning_dist.data.resumable import Resumable
from lightning_dist.data.sharding import distributed_sampler, items_of_batch
from lightning_dist.data.streams import DistributedStream


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
        start = self._start_of(state, states)
        if not taken:
            self.loader.go_on_after_epoch(state, start)
            return
        if taken % self._step:
            raise ValueError(
                f"all ranks together had taken {taken} samples of the epoch, from loaders that shard them themselves; "
                f"with {self._num_data_ranks} data ranks and batches of {self.batch_size} that is between two batches. "
                f"Choose them so that {taken} is a multiple of their product, or resume from the end of an epoch"
            )
        self.loader.skip(taken // self._step, state, start)

    def _start_of(self, state: Any, states: Any) -> Any:
        """How the iteration of the earlier run began; that of a stream which every rank reads alike, on any of them."""
        if isinstance(self._user_loader, DistributedStream):
            state = next((one for one in states or () if one is not None), None)
        return None if state is None else state.get("start")

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
