"""How many batches, and which: as one process takes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_dist.data import samplers, shard_loader
from tests.data.strategies import layouts, strategy_of
from tests.support import models
from tests.support.parity import QUIET, Losses, once
from tests.support.ranks import run_on_ranks


class Indexed(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, count: int) -> None:
        self.samples: Any = models.samples(count)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return *self.samples[index], index


class Reads(models.Classifier):
    """Keeps what it reads; a step may get the batches of several loaders."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[Any] = []
        self.evaluated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = batch.values() if isinstance(batch, dict) else [batch]
        parts = [part for part in parts if part is not None]
        self.read.append([part[2].tolist() for part in parts])
        losses = [super(Reads, self).training_step(part[:2], batch_idx) for part in parts]
        return torch.stack(losses).sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        for part in batch.values() if isinstance(batch, dict) else [batch]:
            if part is not None:
                self.evaluated += [1000 * dataloader_idx + index for index in part[2].tolist()]


def run(layout: str | None, loaders: Any, options: dict[str, Any]) -> dict[str, Any]:
    L.seed_everything(1, verbose=False)
    world = torch.distributed.get_world_size() if layout else 1
    losses, module = Losses(), Reads()
    trainer = L.Trainer(
        **{**QUIET, "num_sanity_val_steps": 0, "max_epochs": 2, **options},
        devices=world, strategy=strategy_of(layout), callbacks=[losses],
    )  # fmt: skip
    ranks = trainer.strategy.num_data_ranks if layout else 1  # type: ignore[attr-defined]
    training, evaluation = loaders(ranks)
    trainer.fit(module, training, evaluation)
    return {"losses": losses.losses, "read": module.read, "evaluated": module.evaluated, "steps": trainer.global_step}


def compare(layout: str, num_ranks: int, loaders: Any, options: dict[str, Any]) -> None:
    """Losses of every step, the samples of each, and those of the evaluations together."""
    one = once(run, None, loaders, options)
    ranks = run_on_ranks(num_ranks, run, layout, loaders, options)
    data_ranks = ranks[:1] if "tp" in layout else ranks
    for step, parts in enumerate(one["read"]):
        for part, expected in enumerate(parts):
            read = [index for rank in data_ranks for index in rank["read"][step][part]]
            assert sorted(read) == sorted(expected), (step, part)
    for rank in ranks:
        assert rank["steps"] == one["steps"]
        torch.testing.assert_close(rank["losses"], one["losses"], rtol=1e-5, atol=1e-6)
    assert sorted(index for rank in data_ranks for index in rank["evaluated"]) == sorted(one["evaluated"])


def ordinary(ranks: int, count: int = 32, drop_last: bool = False, **options: Any) -> Any:
    training = DataLoader(Indexed(count), batch_size=8 // ranks, drop_last=drop_last, **options)
    return training, DataLoader(Indexed(22), batch_size=4)


def dropping(ranks: int) -> Any:
    return ordinary(ranks, 47, True)


@pytest.mark.parametrize(("layout", "num_ranks"), layouts("dp_replicate=2"))
@pytest.mark.parametrize(
    "options",
    [
        {"limit_val_batches": 3, "limit_train_batches": 3, "val_check_interval": 2},
        {"limit_val_batches": 1},
        {"limit_val_batches": 0.5, "limit_train_batches": 0.5},
    ],
)
def test_limits_are_those_of_one_process(layout: str, num_ranks: int, options: dict[str, Any]) -> None:
    compare(layout, num_ranks, ordinary, options)


@pytest.mark.parametrize(("layout", "num_ranks"), layouts("dp_replicate=2", "dp_replicate=2,dp_shard=2"))
def test_a_last_batch_that_is_dropped_is_that_of_one_process(layout: str, num_ranks: int) -> None:
    compare(layout, num_ranks, dropping, {})


# ---------------------------------------------------------------- samplers


class Pairs:
    """Batches of a user's own, of two neighbours each; perhaps of unknown number."""

    def __init__(self, size: int, count: int = 32) -> None:
        self.size, self.count, self.epochs = size, count, 0

    def __iter__(self) -> Iterator[list[int]]:
        self.epochs += 1
        order = [(7 * index + self.epochs) % self.count for index in range(self.count)]
        yield from (order[start : start + self.size] for start in range(0, self.count, self.size))


class Epochs(Sampler[int]):
    """Of a user's own: its order is that of the epoch it was told."""

    def __init__(self, count: int = 32) -> None:
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([(index + 5 * self.epoch) % self.count for index in range(self.count)])

    def __len__(self) -> int:
        return self.count


def own_generator(ranks: int) -> Any:
    return ordinary(ranks, shuffle=True, generator=torch.Generator().manual_seed(5))


def weighted_by_generator(ranks: int) -> Any:
    sampler = WeightedRandomSampler([1.0] * 32, 24, generator=torch.Generator().manual_seed(7))
    return ordinary(ranks, sampler=sampler)


def told_epochs(ranks: int) -> Any:
    return ordinary(ranks, sampler=Epochs())


def subset_by_generator(ranks: int) -> Any:
    return ordinary(ranks, sampler=SubsetRandomSampler(range(4, 28), generator=torch.Generator().manual_seed(7)))


def odd_by_generator(ranks: int) -> Any:
    sampler = RandomSampler(range(32), num_samples=48, generator=torch.Generator().manual_seed(7))
    return ordinary(ranks, sampler=sampler)


SAMPLERS = [own_generator, weighted_by_generator, subset_by_generator, odd_by_generator, told_epochs]


@pytest.mark.parametrize(("layout", "num_ranks"), layouts("dp_replicate=2"))
@pytest.mark.parametrize("loaders", SAMPLERS)
def test_samplers_give_the_order_of_one_process(layout: str, num_ranks: int, loaders: Any) -> None:
    compare(layout, num_ranks, loaders, {"max_epochs": 3})


def own_batches(ranks: int) -> Any:
    batches = BatchSampler(Epochs(), 8 // ranks, False)
    return DataLoader(Indexed(32), batch_sampler=batches), DataLoader(Indexed(22), batch_size=4)


def pairs(ranks: int) -> Any:
    return DataLoader(Indexed(32), batch_sampler=Pairs(8 // ranks)), DataLoader(Indexed(22), batch_sampler=Pairs(4, 22))


@pytest.mark.parametrize(("layout", "num_ranks"), layouts("dp_replicate=2"))
@pytest.mark.parametrize("loaders", [own_batches, pairs])
def test_batch_samplers_of_the_users_own_are_sharded_in_their_order(layout: str, num_ranks: int, loaders: Any) -> None:
    compare(layout, num_ranks, loaders, {"max_epochs": 3})


class WithoutEnd(Sampler[int]):
    """Of a user's own, for ``max_steps``."""

    def __iter__(self) -> Iterator[int]:
        return itertools.cycle(range(7))


class WithoutEndSized(WithoutEnd):
    def __len__(self) -> int:
        return 24


def test_of_a_sampler_without_end_its_length_is_taken() -> None:
    loader = DataLoader(Indexed(32), batch_size=4, sampler=WithoutEndSized())
    shares = [shard_loader(loader, 2, rank, RunningStage.TRAINING) for rank in range(2)]
    taken = [[int(index) for batch in share for index in batch[-1]] for share in shares]
    assert [len(mine) for mine in taken] == [12, 12]
    assert [index for pair in zip(*taken, strict=True) for index in pair] == [index % 7 for index in range(24)]


def test_without_a_length_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "LONGEST", 1000)
    loader = DataLoader(Indexed(32), batch_size=4, sampler=WithoutEnd())
    with pytest.raises(ValueError, match="the WithoutEnd has no __len__ and gives more than 1,000 indices"):
        next(iter(shard_loader(loader, 2, 0, RunningStage.TRAINING)))


def combined(mode: str, val_mode: str, ranks: int) -> Any:
    def loaders(size: int) -> dict[str, DataLoader[Any]]:
        return {"a": DataLoader(Indexed(24), batch_size=size), "b": DataLoader(Indexed(40), batch_size=size)}

    return CombinedLoader(loaders(8 // ranks), mode), CombinedLoader(loaders(4), val_mode)


def by_min(ranks: int) -> Any:
    return combined("min_size", "sequential", ranks)


def by_max(ranks: int) -> Any:
    return combined("max_size", "max_size", ranks)


def by_cycle(ranks: int) -> Any:
    return combined("max_size_cycle", "sequential", ranks)


@pytest.mark.parametrize(("layout", "num_ranks"), layouts("dp_replicate=2")[:2])
@pytest.mark.parametrize("loaders", [by_min, by_max, by_cycle])
def test_combined_loaders_give_what_one_process_gives(layout: str, num_ranks: int, loaders: Any) -> None:
    compare(layout, num_ranks, loaders, {})
