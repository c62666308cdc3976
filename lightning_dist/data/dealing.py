"""Which data rank reads what: dealing of samples and batches, and the random streams of loaders."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import zlib
from array import array
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.data import _update_dataloader, has_iterable_dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler, Sampler, get_worker_info

from lightning_dist.checkpoint.agreement import from_rank_zero
from lightning_dist.randomness import seed_generators


class Dealt(Sampler[Any]):
    """What the user's own sampler yields, dealt to the data ranks in its order.

    Args:
        source: the user's, of samples or of whole batches.
        num_replicas: number of data ranks.
        rank: this data rank.
        seed: of the order; the same on all ranks.
    """

    def __init__(self, source: Any, num_replicas: int, rank: int, seed: int = 0) -> None:
        self.source, self.num_replicas, self.rank, self.seed = source, num_replicas, rank, seed
        self.epoch = 0
        self.taken = 0
        """What all ranks together took of the epoch before; the next iteration deals the rest."""
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
            if callable(inner := getattr(sampler, "set_epoch", None)):
                inner(epoch)

    def __iter__(self) -> Iterator[Any]:
        order = self._repeat() if self._to_repeat is not None else self._draw(self.epoch)
        rest, self.taken = order[self.taken :], 0
        return iter(self._mine(order, rest))

    def state(self) -> dict[str, Any] | None:
        """Of the last order: its epoch and digest, and how the sampler's own generator was before it and is now."""
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

    def _draw(self, epoch: int) -> list[Any]:
        before = None if self.generator is None else self.generator.get_state()
        order = _drawn(self.source, self.seed + epoch)
        self._drawn = {"epoch": epoch, "digest": _digest(order), "before": before}
        return order

    def _repeat(self) -> list[Any]:
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

    def _mine(self, order: list[Any], rest: list[Any]) -> list[Any]:
        raise NotImplementedError

    def __len__(self) -> int:
        """Of a whole epoch."""
        return math.ceil(len(self.source) / self.num_replicas)


class DealtSampler(Dealt):
    """The order of the user's own sampler, dealt to the data ranks one sample after the other.

    Rank r takes the samples r, r + n, r + 2n, ...; the order is filled up from its start so that every rank has the
    same number, as in torch's ``DistributedSampler``. So the k-th batches of all ranks are together the k-th batch of
    one process whose batches are n times as large.

    Every rank draws the same order: the sampler runs under a random state made of ``seed`` and the epoch (which
    Lightning sets), so one process and many ranks see the same epochs. A sampler with a ``generator`` of its own
    draws from that, which :func:`share_generator` makes the same.
    """

    def _mine(self, order: list[Any], rest: list[Any]) -> list[Any]:
        total = math.ceil(len(rest) / self.num_replicas) * self.num_replicas
        if order:
            rest = rest + (order * math.ceil(total / len(order)))[: total - len(rest)]
        return rest[self.rank :: self.num_replicas]


class DealtBatches(Dealt):
    """The user's own batches, dealt whole to the data ranks; every rank yields the same number.

    Rank r takes the batches r, r + n, ... A rank that has none left repeats batch 0: in evaluation that step runs
    along, for the sake of the collectives inside the model, and is not counted (see :meth:`counts`); in training it
    is used, as Lightning's ddp repeats samples.
    """

    def counts(self, batch_idx: int) -> bool:
        """Whether the rank's batch ``batch_idx`` is one that no other rank counts."""
        return batch_idx * self.num_replicas + self.rank < len(self.source)

    @property
    def sampler(self) -> DealtBatches:
        """Itself: Lightning tells the epoch to the batch sampler's ``sampler``."""
        return self

    def _mine(self, order: list[Any], rest: list[Any]) -> list[Any]:
        mine = rest[self.rank :: self.num_replicas]
        if len(mine) < math.ceil(len(rest) / self.num_replicas):
            mine.append(order[0])
        return mine

    def __getattr__(self, name: str) -> Any:
        # what Lightning and users ask of a batch sampler: batch_size, drop_last
        if name == "source":
            raise AttributeError(name)
        return getattr(self.source, name)


class SeededBatches(Sampler[list[Any]]):
    """Batches that bring the seed under which a loader's worker makes them.

    A worker's generators otherwise depend on all that it made since it started, so that a run which is resumed within
    an epoch would augment otherwise.

    Args:
        batches: of indices.
        dealt: the part of them that deals; gives the epoch and what was taken of it.
        items: how many of what is dealt make a batch.
    """

    def __init__(self, batches: Any, dealt: Dealt, items: int) -> None:
        self.batches, self.dealt, self._items = batches, dealt, items

    def __iter__(self) -> Iterator[list[Any]]:
        dealt = self.dealt
        position = dealt.taken + dealt.rank
        for batch in self.batches:
            number = (dealt.seed * 1_000_003 + dealt.epoch) * 1_000_003 + position
            yield SeededBatch(batch, number % 2**31)
            position += self._items * dealt.num_replicas

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


_DIGESTED = 1 << 16


def _digest(order: list[Any]) -> tuple[int, int]:
    """The length of an order and a checksum of some of it."""
    some = order[:: 1 + len(order) // _DIGESTED]
    try:
        data = array("q", some).tobytes()
    except TypeError:
        data = repr(some).encode()
    return len(order), zlib.crc32(data)


def share_generator(loader: object) -> None:
    """Makes the generator that a user's sampler brings the same on all ranks: they deal one order.

    Communication: one broadcast of its state, 5 kB, over the world, if there is one.
    """
    dealt = dealt_by(loader)
    if dealt is not None and dealt.generator is not None:
        dealt.generator.set_state(from_rank_zero(dealt.generator.get_state()))


def _drawn(sampler: Any, seed: int) -> list[Any]:
    """Everything that the sampler yields, drawn under a seed that leaves the process's own streams untouched."""
    with isolate_rng():
        seed_generators(seed)
        return list(sampler)


def deal(loader: DataLoader, num_replicas: int, rank: int, stage: RunningStage | None) -> DataLoader:
    """The loader of this data rank: the user's own order, with each rank's part of it.

    Training deals samples (batches where the user brought a batch sampler of their own); evaluation deals whole
    batches, so that each batch is the one of one process and is counted once. Iterable data sets and loaders
    with a ``DistributedSampler`` stay as they are.

    Args:
        loader: the user's.
        num_replicas: number of data ranks.
        rank: this data rank.
        stage: Lightning's stage that the loader is for.

    Raises:
        ValueError: there are fewer training samples than data ranks, or a ``DistributedSampler`` for other ranks.
    """
    if isinstance(loader.sampler, DistributedSampler):
        if (loader.sampler.num_replicas, loader.sampler.rank) != (num_replicas, rank):
            raise ValueError(
                f"the loader's DistributedSampler deals to {loader.sampler.num_replicas} ranks, and is rank "
                f"{loader.sampler.rank} of them; the layout has {num_replicas} data ranks (dp_replicate x dp_shard), "
                f"of which this is {rank}: pass them as num_replicas= and rank=, or leave the sampler out, which is "
                "not needed"
            )
        return loader
    if has_iterable_dataset(loader):
        return loader
    loader = copy.copy(loader)  # the user may pass the same one again: it must not be dealt twice
    object.__setattr__(loader, "_iterator", None)
    seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
    tracked = loader.batch_sampler
    if isinstance(tracked, _IndexBatchSamplerWrapper):  # Lightning's, which notes the indices while predicting
        return _with_batch_sampler(
            loader, _IndexBatchSamplerWrapper(DealtBatches(tracked._batch_sampler, num_replicas, rank, seed))
        )
    if stage == RunningStage.TRAINING:
        loader = _deal_training(loader, num_replicas, rank, seed)
    elif loader.batch_sampler is None:  # automatic batching is off: the sampler yields whole batches or single samples
        loader = _update_dataloader(loader, DealtBatches(loader.sampler, num_replicas, rank, seed), mode=stage)
    else:
        loader = _with_batch_sampler(loader, DealtBatches(loader.batch_sampler, num_replicas, rank, seed))
    return _with_seeds(loader)


def _with_seeds(loader: DataLoader) -> DataLoader:
    dealt = dealt_by(loader)
    own = loader.worker_init_fn is not None or "PL_GLOBAL_SEED" not in os.environ
    if own or dealt is None or not loader.num_workers or loader.batch_sampler is None:
        return loader
    return _with_batch_sampler(loader, SeededBatches(loader.batch_sampler, dealt, items_of_batch(loader)))


def _deal_training(loader: DataLoader, num_replicas: int, rank: int, seed: int) -> DataLoader:
    # a loader that made its batch sampler itself knows its batch size
    if loader.batch_sampler is not None and loader.batch_size is None:
        if len(loader.batch_sampler) < num_replicas:  # type: ignore[arg-type]
            raise ValueError(_too_few(len(loader.batch_sampler), "batches", num_replicas))  # type: ignore[arg-type]
        return _with_batch_sampler(loader, DealtBatches(loader.batch_sampler, num_replicas, rank, seed))
    if len(loader.sampler) < num_replicas:  # type: ignore[arg-type]
        raise ValueError(_too_few(len(loader.sampler), "samples", num_replicas))  # type: ignore[arg-type]
    return _update_dataloader(loader, DealtSampler(loader.sampler, num_replicas, rank, seed))


def _too_few(count: int, what: str, num_replicas: int) -> str:
    return (
        f"the training data has {count} {what} for {num_replicas} data ranks (dp_replicate x dp_shard), so some ranks "
        f"would have none; use at most {count} data ranks or more data"
    )


def _with_batch_sampler(loader: DataLoader, batch_sampler: Any) -> DataLoader:
    # DataLoader forbids setting it; Lightning would make the sampler anew from its class, which loses the user's
    object.__setattr__(loader, "batch_sampler", batch_sampler)
    return loader


def dealt_by(loader: object) -> Dealt | None:
    """What deals the samples or the batches of a loader; None for one that :func:`deal` left as it is."""
    sampler = getattr(loader, "batch_sampler", None)
    if sampler is None:
        sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, SeededBatches):
        return sampler.dealt
    sampler = getattr(sampler, "_batch_sampler", sampler)
    if not isinstance(sampler, Dealt):
        sampler = getattr(sampler, "sampler", None)
    return sampler if isinstance(sampler, Dealt) else None


def items_of_batch(loader: Any) -> int:
    """How many of the items that :func:`dealt_by` deals make a batch of a rank; samples, where it deals none.

    1 where nothing says how large batches are.
    """
    size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return 1 if isinstance(dealt_by(loader), DealtBatches) or size is None else int(size)


def dealt_batches(loader: object) -> DealtBatches | None:
    """The dealt batch sampler of a loader that went through :func:`deal` for evaluation."""
    dealt = dealt_by(loader)
    return dealt if isinstance(dealt, DealtBatches) else None


def refuse_different_batches(step: str, args: tuple[Any, ...], group: dist.ProcessGroup) -> None:
    """Raises on every rank of the group if they were given different batches.

    Ranks that divide layers between them share their samples; a data set that deals by global rank, or a transform
    that draws from a generator of its own, would train each on its own ones without a word.

    Args:
        step: its name, for the message.
        args: of the step; its tensors are compared.
        group: the ranks with the same data rank.

    Communication: two all-reduces of 8 bytes over the group; none for one rank.

    Raises:
        ValueError: they differ.
    """
    if dist.get_world_size(group) == 1:
        return
    digest = hashlib.sha256()
    leaves = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    for leaf in leaves:
        digest.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    number = int.from_bytes(digest.digest()[:7], "little")
    least = torch.tensor(number, device=leaves[0].device if leaves else "cpu")
    most = least.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group)
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    if int(least) != int(most):
        raise ValueError(
            f"the ranks of a tp or pp group were given different batches by {step}'s loader; they divide the network, "
            "so they have to see the same samples: deal by trainer.strategy.data_rank of num_data_ranks, not by global "
            "rank, and draw augmentation from torch's, numpy's or Python's own generators"
        )


def seed_loader(loader: DataLoader, data_rank: int) -> None:
    """Gives the loader's workers, and the seeds that it draws itself, the stream of the data rank.

    Lightning seeds workers by global rank: augmentation would then differ between ranks that must see the same
    batch. What the user set stays.

    Args:
        loader: changed in place.
        data_rank: ranks with the same one get the same stream.
    """
    if loader.worker_init_fn is None and int(os.environ.get("PL_SEED_WORKERS", 0)):
        loader.worker_init_fn = partial(pl_worker_init_function, rank=data_rank)
    if loader.generator is None and "PL_GLOBAL_SEED" in os.environ:
        seed = loader_seed(data_rank)
        assert seed is not None
        loader.generator = torch.Generator().manual_seed(seed)


def loader_seed(data_rank: int) -> int | None:
    """Of what a loader of a data rank draws itself; None where the user seeded nothing."""
    return int(os.environ["PL_GLOBAL_SEED"]) + 7919 * data_rank if "PL_GLOBAL_SEED" in os.environ else None
