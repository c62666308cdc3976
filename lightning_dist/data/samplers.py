"""Samplers of a data rank, its part of what the user's own sampler yields; and what its loaders and workers draw."""

from __future__ import annotations

import itertools
import math
import os
import zlib
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Sampler, get_worker_info

from lightning_dist.data.orders import ComputedOrder, ComputedSampler
from lightning_dist.random_states import seed_generators

LONGEST = 10_000_000
"""Indices that are drawn of a sampler that does not tell its length, before it is taken for one without end."""

END = object()


class Shares:
    """Samples or batches of which each of ``num_replicas`` data ranks takes some: of a sampler, or of a stream."""

    num_replicas: int
    rank: int
    total: float = math.inf
    """Of the last iteration, once they are known."""
    unit: int | None = None
    """What is left over at the end is filled up, or cut, to a multiple of this; None: of the number of data ranks."""
    drops_last = False
    _limit: float | None = math.inf
    """Of all ranks together; None until it is said."""

    def of_each(self, items: int) -> int:
        """How many of so many items each data rank takes."""
        unit = self.unit or self.num_replicas
        units = items // unit if self.drops_last else math.ceil(items / unit)
        return units * unit // self.num_replicas

    def limit(self, items: float) -> float:
        """All ranks together take the first so many items; returns how many this one takes at most."""
        if self._limit is None:
            self._limit = items
        return self._limit if math.isinf(self._limit) else self.of_each(int(self._limit))

    def counts(self, index: int) -> bool:
        """Whether the rank's item of this index is one that no other rank counts."""
        return index * self.num_replicas + self.rank < self.total


class DistributedOrder(Shares, Sampler[Any]):
    """What the user's own sampler yields, sharded over the data ranks in its order.

    Args:
        source: the user's, of samples or of whole batches.
        num_replicas, rank: the number of data ranks, and this one.
        seed: of the order; the same on all ranks.
    """

    def __init__(self, source: Any, num_replicas: int, rank: int, seed: int = 0) -> None:
        self.source, self.num_replicas, self.rank, self.seed = source, num_replicas, rank, seed
        self.epoch = self.taken = 0
        """What all ranks together took of the epoch before; the next iteration shards the rest."""
        self.told_by_lightning: Any = None
        """A sampler that Lightning finds by itself, and tells the epoch."""
        self.mine: Sequence[Any] = []
        """This rank's, of the iteration that began last."""
        self._source: Iterator[Any] | None = None
        """The user's sampler's, in the iteration that runs."""
        self._drawn: dict[str, Any] | None = None
        self._to_repeat: dict[str, Any] | None = None
        self._resumed: dict[str, Any] | None = None
        """The state of the earlier run, as long as nothing was drawn since."""

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next iteration takes; passed on to samplers that know epochs."""
        if epoch != self.epoch:
            self.taken = 0
        self.epoch = epoch
        for sampler in (self.source, getattr(self.source, "sampler", None)):
            if sampler is not self.told_by_lightning and callable(inner := getattr(sampler, "set_epoch", None)):
                inner(epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_source": None, "mine": []}  # an iteration that runs can't be sent, or copied

    def __iter__(self) -> Iterator[Any]:
        order = self._repeat() if self._to_repeat is not None else self._draw(self.epoch)
        rest, self.taken = order[self.taken :], 0
        self.mine = mine = self._mine(order, rest)
        if len(mine) * self.num_replicas > len(rest):  # one process comes to the end within a batch
            self._end_source()
        return self._until_end(mine)

    def _until_end(self, mine: Sequence[Any]) -> Iterator[Any]:
        yield from mine
        self._end_source()

    def _end_source(self) -> None:
        """The user's sampler is asked for more than it has, as far as one process would ask it.

        RandomSampler draws once more from its generator then, which makes the next epoch another (seen in torch 2.14).
        """
        source, self._source = self._source, None
        if source is not None:
            next(source, None)

    def state(self) -> dict[str, Any] | None:
        """The last order's epoch and digest, and how the sampler's own generator was before it and is now."""
        if self._drawn is None:
            return self._resumed
        return {**self._drawn, "now": None if self.generator is None else self.generator.get_state()}

    def go_on(self, state: dict[str, Any] | None) -> None:
        """The next iteration goes on where an earlier run was, by its :meth:`state`."""
        self._to_repeat = self._resumed = state
        if state is None or self.generator is None or state["now"] is None or state["epoch"] == self.epoch:
            return
        self.generator.set_state(state["now"])  # from which the loader itself may draw before the sampler
        self._to_repeat = None

    @property
    def generator(self) -> torch.Generator | None:
        """That the user's sampler brings."""
        for sampler in (self.source, getattr(self.source, "sampler", None)):
            if isinstance(generator := getattr(sampler, "generator", None), torch.Generator):
                return generator
        return None

    def _draw(self, epoch: int) -> Sequence[Any]:
        before = None if self.generator is None else self.generator.get_state()
        self._source = source = iter(self.source)
        size = sized_len(self.source)
        with isolate_rng():  # leaves the process's own streams untouched
            seed_generators(self.seed + epoch)
            order = list(itertools.islice(source, LONGEST if size is None else size))
            if self.generator is None:
                self._source = None
                if next(source, END) is not END and size is None:
                    self._refuse_endless()
        self._drawn = {"epoch": epoch, "digest": _digest(order), "before": before}
        return order

    def _refuse_endless(self) -> None:
        kind = type(getattr(self.source, "sampler", self.source)).__name__
        raise ValueError(
            f"the {kind} has no __len__ and gives more than {LONGEST:,} indices, so its order can't be drawn and dealt "
            "to the data ranks; give it a __len__ (the samples of an epoch), or read a stream (IterableDataset)"
        )

    def _repeat(self) -> Sequence[Any]:
        """The order of the epoch, once the sampler has drawn what the earlier run had drawn last.

        A sampler with a state that nobody sees comes to it by drawing as often as it had by then.
        """
        wanted, self._to_repeat = self._to_repeat, None
        assert wanted is not None
        if self.generator is not None and wanted["before"] is not None:
            self.generator.set_state(wanted["before"])
        for _ in range(1 + wanted["epoch"]):
            order = self._draw(wanted["epoch"])
            if _digest(order) == wanted["digest"]:
                break
        else:
            kind = type(getattr(self.source, "sampler", self.source)).__name__
            rank_zero_warn(
                f"the order of the samples before the checkpoint can't be drawn again: other data, or the {kind} draws "
                "from a state of its own. The rest of this epoch may repeat samples and leave others out; draw from a "
                "torch.Generator that is its attribute `generator`, or from torch's, numpy's or Python's own generators"
            )
        return order if wanted["epoch"] == self.epoch else self._draw(self.epoch)

    def _mine(self, order: Any, rest: Any) -> Sequence[Any]:
        raise NotImplementedError

    def __len__(self) -> int:
        """This rank's items of a whole epoch."""
        return self.of_each(len(self.source))


class DistributedSamples(DistributedOrder):
    """The order of the user's own sampler, sharded over the data ranks one sample after the other.

    Rank r takes the samples r, r + n, r + 2n, ...; the order is filled up from its start so that every rank has the
    same number, as in torch's ``DistributedSampler`` (or cut, for a loader that drops its last batch). So the k-th
    batches of all ranks are together the k-th batch of one process whose batches are n times as large.

    Every rank draws the same order: the sampler runs under a random state made of ``seed`` and the epoch (which
    Lightning sets), so one process and many ranks see the same epochs. A sampler with a ``generator`` of its own
    draws from that, which :func:`share_generator` makes the same. An order that is computed by index is not held.
    """

    def __init__(self, source: Any, num_replicas: int, rank: int, seed: int = 0, drop_last: bool = False) -> None:
        super().__init__(source, num_replicas, rank, seed)
        self.drops_last = drop_last

    def _draw(self, epoch: int) -> Sequence[Any]:
        if not isinstance(self.source, ComputedSampler):
            return super()._draw(epoch)
        order = self.source.order(epoch)
        self._drawn = {"epoch": epoch, "digest": _digest(order), "before": None}
        return order

    def _mine(self, order: Any, rest: Any) -> Sequence[Any]:
        total = self.of_each(len(rest)) * self.num_replicas
        if isinstance(rest, ComputedOrder):
            return rest.of_length(total)[self.rank :: self.num_replicas]
        if order and total > len(rest):
            rest = rest + (order * math.ceil(total / len(order)))[: total - len(rest)]
        return rest[:total][self.rank :: self.num_replicas]


class DistributedBatches(DistributedOrder):
    """The user's own batches, sharded whole over the data ranks; every rank yields the same number.

    Rank r takes the batches r, r + n, ... A rank that has none left repeats batch 0: in evaluation that step runs
    along, for the sake of the collectives inside the model, and is not counted (see :meth:`counts`); in training it
    is used, as Lightning's ddp repeats samples.

    Args:
        limited: how many batches all ranks take together is said later, by :meth:`limit`; until then the length is that
            of one process, of which Lightning takes its limits.
    """

    def __init__(self, source: Any, num_replicas: int, rank: int, seed: int = 0, limited: bool = False) -> None:
        super().__init__(source, num_replicas, rank, seed)
        self._limit = None if limited else math.inf

    def __len__(self) -> int:
        return len(self.source) if self._limit is None else self.of_each(len(self.source))

    @property
    def sampler(self) -> DistributedBatches:
        """Itself: Lightning tells the epoch to the batch sampler's ``sampler``."""
        return self

    def _mine(self, order: Any, rest: Any) -> Sequence[Any]:
        if self._limit is not None and len(rest) > self._limit:
            rest = rest[: int(self._limit)]
        self.total = len(rest)
        mine = rest[self.rank :: self.num_replicas]
        return mine + order[:1] * (self.of_each(len(rest)) - len(mine))

    def __getattr__(self, name: str) -> Any:
        # what Lightning and users ask of a batch sampler: batch_size, drop_last
        if name == "source":
            raise AttributeError(name)
        return getattr(self.source, name)


def _digest(order: Sequence[Any]) -> tuple[int, int]:
    """The length of an order and a checksum of some of it."""
    some = order[:: 1 + len(order) // (1 << 16)]
    try:
        data = some.values().tobytes() if isinstance(some, ComputedOrder) else array("q", some).tobytes()
    except TypeError:
        data = repr(some).encode()
    return len(order), zlib.crc32(data)


def seed_loader(loader: DataLoader, data_rank: int) -> None:
    """Gives the loader's workers, and the seeds that it draws itself, the stream of the data rank.

    Lightning seeds workers by global rank: augmentation would then differ between ranks that must see the same
    batch. What the user set stays; the loader is changed in place.
    """
    if loader.worker_init_fn is None and int(os.environ.get("PL_SEED_WORKERS", 0)):
        loader.worker_init_fn = partial(pl_worker_init_function, rank=data_rank)
    if loader.worker_init_fn is None and data_rank and "PL_GLOBAL_SEED" not in os.environ:
        loader.worker_init_fn = partial(_part_worker, data_rank)  # what they start from was drawn alike on all ranks
    if loader.generator is None and "PL_GLOBAL_SEED" in os.environ:
        loader.generator = torch.Generator().manual_seed(cast(int, loader_seed(data_rank)))


def _part_worker(data_rank: int, worker: int) -> None:
    """Gives a worker process the stream of a data rank."""
    seed_generators(torch.initial_seed() % 2**62 + 7919 * data_rank)


def loader_seed(data_rank: int) -> int | None:
    """The seed of what a loader of a data rank draws itself; None where the user seeded nothing."""
    return int(os.environ["PL_GLOBAL_SEED"]) + 7919 * data_rank if "PL_GLOBAL_SEED" in os.environ else None


class SeededBatches(Sampler[list[Any]]):
    """Batches that bring the seed under which a loader's worker makes them.

    A worker's generators otherwise depend on all that it made since it started, so that a run which is resumed within
    an epoch would augment otherwise.

    Args:
        batches: of indices.
        order, items: what shards them or their samples, and how many of those make a batch.
    """

    def __init__(self, batches: Any, order: DistributedOrder, items: int) -> None:
        self.batches, self.order, self._items = batches, order, items

    def __iter__(self) -> Iterator[list[Any]]:
        order = self.order
        position = order.taken + order.rank
        for batch in self.batches:
            number = (order.seed * 1_000_003 + order.epoch) * 1_000_003 + position
            yield SeededBatch(batch, number % 2**31)
            position += self._items * order.num_replicas

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name == "batches":
            raise AttributeError(name)
        return getattr(self.batches, name)


class SeededBatch(list[Any]):
    """Indices of a batch; a worker that goes through them seeds its generators first."""

    def __init__(self, indices: Any = (), seed: int | None = None) -> None:
        super().__init__(indices)
        self.seed = seed

    def __iter__(self) -> Iterator[Any]:
        if self.seed is not None and get_worker_info() is not None:
            seed_generators(self.seed)
        return super().__iter__()
