"""Ranks that divide layers between them see the same samples, draw the same numbers, and count once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_dist import HybridStrategy
from tests.support import models
from tests.support.models import BLOCK_PLAN, samples
from tests.support.parity import QUIET
from tests.support.ranks import RankError, run_on_ranks


class ByRank(IterableDataset):
    """Deals by global rank, as scripts for ddp do."""

    def __iter__(self) -> Iterator[Any]:
        return iter([samples()[i] for i in range(dist.get_rank(), 64, dist.get_world_size())])


class Augmented(Dataset):
    """Draws from every generator that augmentation draws from."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, random.random(), float(np.random.rand()), float(torch.rand(()))])


class Reader(models.Classifier):
    """Keeps what it reads."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen = [*getattr(self, "seen", []), batch]


def _trainer(layout: str) -> L.Trainer:
    strategy = HybridStrategy(layout, tensor_plan=BLOCK_PLAN)
    return L.Trainer(**QUIET, devices=dist.get_world_size(), strategy=strategy, max_epochs=1)


def _fit(layout: str, loader: Any) -> None:
    _trainer(layout).fit(models.Classifier(), loader())


def _by_rank() -> DataLoader:
    return DataLoader(ByRank(), batch_size=4)


def _sampler_of_all_ranks() -> DataLoader:
    return DataLoader(samples(), batch_size=4, sampler=DistributedSampler(samples()))


def test_different_batches_are_refused() -> None:
    with pytest.raises(RankError, match="given different batches by training_step's loader"):
        run_on_ranks(2, _fit, "tp=2", _by_rank)
    run_on_ranks(2, _fit, "dp_shard=2", _by_rank)


def test_a_sampler_that_is_for_all_ranks_is_refused() -> None:
    with pytest.raises(RankError, match=r"is for 4 ranks, as rank . of them; the layout has 2 data ranks"):
        run_on_ranks(4, _fit, "dp_shard=2,tp=2", _sampler_of_all_ranks)
    run_on_ranks(2, _fit, "dp_replicate=2", _sampler_of_all_ranks)


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_is_alike_without_a_seed(workers: int) -> None:
    first, second, *others = run_on_ranks(4, _read, workers)
    assert torch.equal(first, second)
    assert torch.equal(*others)
    shared = (first[:, None, 1:] == others[0][None, :, 1:]).any()
    assert not shared


def _read(workers: int) -> Tensor:
    """Each rank starts with generators of its own, as processes that nobody seeds do."""
    seed = 10 + dist.get_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    module = Reader()
    loader = DataLoader(Augmented(), batch_size=4, num_workers=workers)
    _trainer("dp_shard=2,tp=2").fit(module, loader)
    return torch.cat(module.seen)
