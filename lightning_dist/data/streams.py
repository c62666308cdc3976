"""Data that is read as a stream, by the same code on every rank: each data rank takes its share of the batches."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.data import has_iterable_dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dist.compat.torch import StandsForLoader, as_first_worker
from lightning_dist.data.samplers import Shares
from lightning_dist.pytree import tree_leaves
from lightning_dist.random_states import CPU, RandomStates, kept_random_states, seed_generators
from lightning_dist.snapshot import Snapshot


class DistributedStream(StandsForLoader, Shares):
    """A loader of an iterable data set, or any iterable of batches, of which every data rank reads all and takes some.

    Rank r takes the batches r, r + n, ..., as :class:`~lightning_dist.data.DistributedBatches`: together they are the
    batch of one process that is n times as large (with several workers, the batches come in the workers' order). If
    batches are left that are fewer than ranks, some repeat their first: in training it is used, in evaluation it is not
    counted. Reading draws from generators that are alike on all ranks, so a stream that shuffles is the same one.

    Args:
        loader: the user's, which yields the same on every rank.
        num_replicas, rank: the number of data ranks, and this one.
        random: states of the generators that the first batch is read with; the same on all ranks.
        drop_last: leave out the batches at the end that are fewer than ranks.
        limited: as of :class:`~lightning_dist.data.DistributedBatches`.
    """

    def __init__(
        self,
        loader: Any,
        num_replicas: int,
        rank: int,
        random: RandomStates,
        drop_last: bool = False,
        limited: bool = False,
    ) -> None:
        super().__init__(loader)
        self.num_replicas, self.rank, self.random = num_replicas, rank, random
        """``random``: of the generators that the next batch is read with."""
        self.drops_last, self._limit = drop_last, None if limited else math.inf
        if sized_len(loader) is not None:
            self.__class__ = _SizedStream

    def __iter__(self) -> Iterator[Any]:
        self.total = math.inf
        batches = self._draw(lambda: iter(self.loader))
        first: list[Any] = []
        for done in itertools.count(0, self.num_replicas):
            mine, size = self._round(batches, done)
            if size < self.num_replicas:
                self.total = done + size
                if not size or self.drops_last:
                    return
                mine = mine or first or self._head
            first = first or mine
            yield mine[0]
            if size < self.num_replicas:
                return

    def _round(self, batches: Iterator[Any], done: int) -> tuple[list[Any], int]:
        """This rank's batch of the next one for each rank, if it has one; and how many there are."""
        mine: list[Any] = []
        limit = math.inf if self._limit is None else self._limit
        for index in range(self.num_replicas):
            if done + index >= limit:
                return mine, index
            try:
                batch = self._draw(lambda: next(batches))
            except StopIteration:
                return mine, index
            if index == 0:
                self._head = [batch]
            if index == self.rank:
                mine = [batch]
        return mine, self.num_replicas

    def _draw(self, read: Any) -> Any:
        with kept_random_states(CPU):
            self.random.restore(CPU)
            try:
                return read()
            finally:
                self.random = RandomStates.now(CPU)

    def __getattr__(self, name: str) -> Any:
        if name == "loader" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.loader, name)


class _SizedStream(DistributedStream):
    def __len__(self) -> int:
        """This rank's batches; those of one process, until a limit was said."""
        if self._limit is None:
            return len(self.loader)
        return self.of_each(int(min(self._limit, len(self.loader))))


def is_stream(loader: Any) -> bool:
    """Whether what a loader yields is its own affair: iterable data, or no ``DataLoader`` at all."""
    return has_iterable_dataset(loader) if isinstance(loader, DataLoader) else hasattr(loader, "__iter__")


def shard_stream(loader: Any, num_replicas: int, rank: int, group: dist.ProcessGroup, training: bool) -> Any:
    """The loader as it is, if its owner shards it; a :class:`DistributedStream`, if all data ranks read the same.

    Two samples are read from an iterator that is thrown away, as the first worker would if there are any, with
    generators that are alike on all ranks; the data set's attributes are put back. Of an iterator, which can be read
    once only, a copy is read. What ranks read apart is left as it is; so is what can't be read here, with a warning.

    Args:
        loader: see :func:`is_stream`.
        num_replicas, rank, group: the number of data ranks, this one, and all of them.
        training: as opposed to evaluation.

    Communication: one all-gather of a digest, and of generators' states of 8 kB, as objects over the group.

    Raises:
        ValueError: on every rank, if some data ranks read the same and others do not.
    """
    everyone: list[Any] = [None] * num_replicas
    dist.all_gather_object(everyone, (*_digest(loader), RandomStates.now(CPU).to_state()), group)
    digests = [digest for digest, _, _ in everyone]
    unknown = next((why for digest, why, _ in everyone if digest is None), None)
    name = type(_source(loader)).__name__
    if unknown is not None:
        rank_zero_warn(
            f"whether data ranks read the same of {name} can't be seen ({unknown}), so each rank reads it as it is. If "
            "it is written for one process, all train on the same samples: shard it by trainer.strategy.data_rank of "
            "num_data_ranks, or pass an iterable that can be read anew; Trainer(use_distributed_sampler=False) says "
            "that it is meant so"
        )
        return loader
    if len(set(digests)) == num_replicas:
        return loader
    if len(set(digests)) > 1:
        same = [index for index, digest in enumerate(digests) if digests.count(digest) > 1]
        raise ValueError(
            f"of the data of {name}, data ranks {', '.join(map(str, same))} read the same and others "
            "do not: shard it by trainer.strategy.data_rank of num_data_ranks, leave that out (it is then done for "
            "you), or say Trainer(use_distributed_sampler=False) if it is meant so"
        )
    drop_last = training and bool(getattr(loader, "drop_last", False))
    random = RandomStates.from_state(everyone[0][-1])
    return DistributedStream(loader, num_replicas, rank, random, drop_last, limited=not training)


def tensor_bytes(tensor: Tensor) -> bytes:
    """The memory of a tensor, to be compared."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _source(loader: Any) -> Any:
    return loader.dataset if isinstance(loader, DataLoader) else loader


def _digest(loader: Any) -> tuple[str | None, str]:
    """A digest of the first samples; None, and why, where they can't be read here."""
    source = _source(loader)
    snapshot = Snapshot([source] if hasattr(source, "__dict__") else [], data=True)
    digest, threads = hashlib.sha256(), torch.get_num_threads()
    try:
        with kept_random_states(CPU), as_first_worker(loader):
            if getattr(loader, "num_workers", 0) and loader.worker_init_fn is not None:
                loader.worker_init_fn(0)  # the owner may shard by it, and workers often have one thread
            seed_generators(0)
            samples = iter(source)
            if samples is source:
                samples = iter(copy.deepcopy(source))  # it can be read once only
            for leaf in tree_leaves(list(itertools.islice(samples, 2))):
                digest.update(_bytes_of(leaf))
    except Exception as error:  # it may want what only the training brings
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        snapshot.restore()
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
    return digest.hexdigest(), ""


def _bytes_of(leaf: Any) -> bytes:
    """What tells a sample's part from others, and is the same in all processes."""
    if isinstance(leaf, Tensor):
        return tensor_bytes(leaf)
    if isinstance(leaf, (str, bytes, int, float, bool, type(None))):
        return repr(leaf).encode()
    if isinstance(leaf, (set, frozenset)):  # whose order each process draws for itself
        return repr(sorted(map(repr, leaf))).encode()
    if hasattr(leaf, "__array_interface__"):  # numpy's, and Pillow's images
        array = np.asarray(leaf)
        if not array.dtype.hasobject:
            return f"{array.dtype} {array.shape}".encode() + array.tobytes()
    return pickle.dumps(leaf)
