"""The random streams of loaders: their orders, and what their workers draw."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader, Sampler, get_worker_info

from lightning_dist.data.samplers import DistributedOrder
from lightning_dist.random_states import seed_generators


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
    if loader.worker_init_fn is None and data_rank and "PL_GLOBAL_SEED" not in os.environ:
        loader.worker_init_fn = partial(_part_worker, data_rank)  # what they start from was drawn alike on all ranks
    if loader.generator is None and "PL_GLOBAL_SEED" in os.environ:
        seed = loader_seed(data_rank)
        assert seed is not None
        loader.generator = torch.Generator().manual_seed(seed)


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
        order: what shards them or their samples; gives the epoch and what was taken of it.
        items: how many of what is sharded make a batch.
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
