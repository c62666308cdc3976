"""Loaders that Fabric sets up: each data rank's part of the user's own order.

Fabric puts torch's ``DistributedSampler`` in place of a sampler, or around one. It shuffles by a seed that ranks may
have set apart, forgets a loader's generator, and lets each rank draw its own order from a sampler that draws: here the
order is drawn once, alike on all ranks, and sharded.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lightning_dist.collectives import broadcast_object
from lightning_dist.compat.fabric import wrapped_sampler
from lightning_dist.data import share_generator
from lightning_dist.data.samplers import DistributedSamples


class Injected(int):
    """A seed by which a sampler of Fabric's is told from one of the user's."""

    @classmethod
    def of_environment(cls) -> Injected:
        """That of ``seed_everything``."""
        return cls(os.environ.get("PL_GLOBAL_SEED", 0))


def shard_injected(loader: DataLoader, num_replicas: int, rank: int) -> None:
    """Shards the user's own order over the data ranks where Fabric has put a sampler; changes the loader in place.

    Communication: a broadcast of a number over the world, and see :func:`~lightning_dist.data.share_generator`.

    Raises:
        ValueError: the user brought a ``DistributedSampler`` for other ranks.
    """
    batches: Any = loader.batch_sampler
    samplers: list[Any] = [loader.sampler, getattr(batches, "sampler", None)]
    found = [sampler for sampler in samplers if isinstance(getattr(sampler, "seed", None), Injected)]
    if not found:
        _validate_ranks(loader.sampler, num_replicas, rank)
        return
    seed = int(broadcast_object(found[0].seed))
    sampler = DistributedSamples(_source_of(found[0], loader), num_replicas, rank, seed, loader.drop_last)
    if loader.sampler is found[0]:
        object.__setattr__(loader, "sampler", sampler)  # which DataLoader forbids
    if samplers[1] is found[0]:
        batches.sampler = sampler
    share_generator(loader)


def seed_workers(loader: DataLoader, global_rank: int, data_rank: int) -> None:
    """Fabric seeds workers by global rank: ranks that must see the same samples would augment them otherwise."""
    given = loader.worker_init_fn
    if isinstance(given, partial) and given.func is pl_worker_init_function and given.keywords == {"rank": global_rank}:
        loader.worker_init_fn = partial(pl_worker_init_function, rank=data_rank)


def _source_of(sampler: Any, loader: DataLoader) -> Any:
    """What the user's loader had in its place, as far as it can be seen."""
    if isinstance(sampler, DistributedSamplerWrapper):
        return wrapped_sampler(sampler)
    if sampler.shuffle:
        return RandomSampler(loader.dataset, generator=loader.generator)  # type: ignore[arg-type]
    return SequentialSampler(loader.dataset)  # type: ignore[arg-type]


def _validate_ranks(sampler: Any, num_replicas: int, rank: int) -> None:
    if isinstance(sampler, DistributedSampler) and (sampler.num_replicas, sampler.rank) != (num_replicas, rank):
        raise ValueError(
            f"the loader's DistributedSampler is for {sampler.num_replicas} ranks, as rank {sampler.rank} of "
            f"them; the layout has {num_replicas} data ranks (dp_replicate x dp_shard), of which this is {rank}: leave "
            "the sampler out, or pass it num_replicas=fabric.strategy.num_data_ranks, rank=fabric.strategy.data_rank"
        )
