"""Loaders sharded over the data ranks."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.data import has_iterable_dataset
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_dist.collectives import broadcast_object
from lightning_dist.compat.lightning import IndexBatchSamplerWrapper, with_sampler, without_index_wrapper
from lightning_dist.compat.torch import forget_iterator
from lightning_dist.data.samplers import DistributedBatches, DistributedOrder, DistributedSamples, SeededBatches
from lightning_dist.data.streams import tensor_bytes
from lightning_dist.pytree import tree_leaves


def shard_loader(
    loader: DataLoader,
    num_replicas: int,
    rank: int,
    stage: RunningStage | None,
    divide: Callable[[DataLoader], DataLoader] = lambda loader: loader,
) -> DataLoader:
    """The loader of this data rank: the user's own order, with each rank's part of it.

    An evaluation loader has the length of one process until :meth:`DistributedBatches.limit` was called.

    Training shards samples (batches where the user brought a batch sampler of their own); evaluation shards whole
    batches, so that each batch is the one of one process and is counted once. Iterable data sets and loaders
    with a ``DistributedSampler`` stay as they are.

    Args:
        loader: the user's.
        num_replicas, rank: the number of data ranks, and this one.
        stage: Lightning's stage that the loader is for.
        divide: gives a training loader's batches their size, once its samples are sharded.

    Raises:
        ValueError: there are fewer training samples than data ranks, or a ``DistributedSampler`` for other ranks.
    """
    if isinstance(loader.sampler, DistributedSampler):
        _validate_ranks(loader.sampler, num_replicas, rank)
    if isinstance(loader.sampler, DistributedSampler) or has_iterable_dataset(loader):
        return loader
    loader = copy.copy(loader)  # the user may pass the same one again: it must not be sharded twice
    forget_iterator(loader)
    seed, tracked = int(os.environ.get("PL_GLOBAL_SEED", 0)), loader.batch_sampler
    if isinstance(tracked, IndexBatchSamplerWrapper):  # Lightning's, which notes the indices while predicting
        own = without_index_wrapper(tracked)
        wrapper = IndexBatchSamplerWrapper(DistributedBatches(own, num_replicas, rank, seed, limited=True))
        for name in ("sampler", "batch_size", "drop_last"):  # a prediction writer may ask for them
            if hasattr(own, name):
                vars(wrapper)[name] = getattr(own, name)
        return with_batch_sampler(loader, wrapper)
    if stage == RunningStage.TRAINING:
        loader = divide(_shard_training(loader, num_replicas, rank, seed))
    elif loader.batch_sampler is None:  # automatic batching is off: the sampler yields whole batches or single samples
        batches = DistributedBatches(loader.sampler, num_replicas, rank, seed, limited=True)
        loader = with_sampler(loader, batches, stage)
    else:
        batches = DistributedBatches(loader.batch_sampler, num_replicas, rank, seed, limited=True)
        batches.told_by_lightning = loader.sampler
        loader = with_batch_sampler(loader, batches)
    return _with_seeds(loader)


def _validate_ranks(sampler: DistributedSampler, num_replicas: int, rank: int) -> None:
    if (sampler.num_replicas, sampler.rank) != (num_replicas, rank):
        raise ValueError(
            f"the loader's DistributedSampler is for {sampler.num_replicas} ranks, as rank {sampler.rank} of them; the "
            f"layout has {num_replicas} data ranks (dp_replicate x dp_shard), of which this is {rank}: pass them as "
            "num_replicas= and rank=, or leave the sampler out, which is not needed"
        )


def _with_seeds(loader: DataLoader) -> DataLoader:
    order = distributed_sampler(loader)
    own = loader.worker_init_fn is not None or "PL_GLOBAL_SEED" not in os.environ
    if own or order is None or not loader.num_workers or loader.batch_sampler is None:
        return loader
    return with_batch_sampler(loader, SeededBatches(loader.batch_sampler, order, items_of_batch(loader)))


def _shard_training(loader: DataLoader, num_replicas: int, rank: int, seed: int) -> DataLoader:
    # a loader that made its batch sampler itself knows its batch size
    if loader.batch_sampler is not None and loader.batch_size is None:
        _validate_count(sized_len(loader.batch_sampler), "batches", num_replicas)
        return with_batch_sampler(loader, DistributedBatches(loader.batch_sampler, num_replicas, rank, seed))
    _validate_count(sized_len(loader.sampler), "samples", num_replicas)
    samples = DistributedSamples(loader.sampler, num_replicas, rank, seed, loader.drop_last)
    return with_sampler(loader, samples)


def _validate_count(count: int | None, what: str, num_replicas: int) -> None:
    if count and count < num_replicas:  # Lightning trains on nothing, with a warning
        raise ValueError(
            f"the training data has {count} {what} for {num_replicas} data ranks (dp_replicate x dp_shard), so some "
            f"ranks would have none; use at most {count} data ranks or more data"
        )


def with_batch_sampler(loader: DataLoader, batch_sampler: Any) -> DataLoader:
    """The same loader, whose batches are others from here on."""
    # DataLoader forbids setting it; Lightning would make the sampler anew from its class, which loses the user's
    object.__setattr__(loader, "batch_sampler", batch_sampler)
    return loader


def distributed_sampler(loader: object) -> DistributedOrder | None:
    """What shards the samples or the batches of a loader; None for one that :func:`shard_loader` left as it is."""
    sampler = getattr(loader, "batch_sampler", None)
    if sampler is None:
        sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, SeededBatches):
        return sampler.order
    sampler = without_index_wrapper(sampler)
    if not isinstance(sampler, DistributedOrder):
        sampler = getattr(sampler, "sampler", None)
    return sampler if isinstance(sampler, DistributedOrder) else None


def items_of_batch(loader: Any) -> int:
    """How many items of the :func:`distributed_sampler`, or samples, make a batch of a rank; 1 where none says."""
    size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return 1 if isinstance(distributed_sampler(loader), DistributedBatches) or size is None else int(size)


def distributed_batches(loader: object) -> DistributedBatches | None:
    """The distributed batch sampler of a loader that went through :func:`shard_loader` for evaluation."""
    order = distributed_sampler(loader)
    return order if isinstance(order, DistributedBatches) else None


def validate_same_batches(step: str, args: tuple[Any, ...], group: dist.ProcessGroup, device: torch.device) -> None:
    """Raises on every rank of the group if they were given different batches.

    Ranks that divide layers between them share their samples; a data set that shards itself by global rank, or a
    transform that draws from a generator of its own, would train each on its own ones without a word.

    Args:
        step, args: its name, for the message, and what it was given, whose tensors are compared.
        group: the ranks with the same data rank.
        device: of this rank, by which they communicate.

    Communication: one all-reduce of 16 bytes over the group; none for one rank.

    Raises:
        ValueError: they differ.
    """
    if dist.get_world_size(group) == 1:
        return
    digest = hashlib.sha256()
    for leaf in tree_leaves(args):
        if isinstance(leaf, Tensor):
            digest.update(tensor_bytes(leaf))
    number = int.from_bytes(digest.digest()[:7], "little")
    extremes = torch.tensor([number, -number], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    most, least = extremes.tolist()
    if most != -least:
        raise ValueError(
            f"the ranks of a tp or pp group were given different batches by {step}'s loader; they divide the network, "
            "so they have to see the same samples: shard by the strategy's data_rank of num_data_ranks, not by "
            "global rank, and draw augmentation from torch's, numpy's or Python's own generators"
        )


def share_generator(loader: object) -> None:
    """Makes the generators that a user's loader and sampler bring the same on all ranks: they draw one order.

    Communication: one broadcast of a state, 5 kB, over the world, for each.
    """
    order = distributed_sampler(loader)
    own = [getattr(loader, "generator", None), None if order is None else order.generator]
    for generator in {id(generator): generator for generator in own}.values():
        if isinstance(generator, torch.Generator):
            generator.set_state(broadcast_object(generator.get_state()))
