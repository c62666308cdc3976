"""The order of samples of shards: of all data ranks together, from seed and epoch, and from where a run was stopped."""

from __future__ import annotations

import itertools
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_dist.data import ShardCache, ShardDataset, ShardSampler, TrainingData, shard_loader
from lightning_dist.data.shards.sampler import ShardShuffle

TRAINING = RunningStage.TRAINING


class Numbers(Dataset):
    """In place of samples, their indices."""

    cache = ShardCache("nowhere")

    def __init__(self, *sources: list[int]) -> None:
        self.sizes_of_sources = list(sources)

    def __len__(self) -> int:
        return sum(map(sum, self.sizes_of_sources))

    def __getitem__(self, index: int) -> int:
        return index

    def bytes_read(self, num_samples: int) -> float:
        return 0.0

    def prefetch(self, samples: np.ndarray) -> None:
        pass


UNEVEN = [37, 1, 80, 0, 52, 13, 64, 9, 100, 44]


def sampler(*sources: list[int], **options: Any) -> ShardSampler:
    return ShardSampler(cast(ShardDataset, Numbers(*sources)), **{"seed": 3, **options})


@pytest.mark.parametrize("parts", [1, 3, 8])
@pytest.mark.parametrize("window", [1, 50, 1 << 14])
@pytest.mark.parametrize("sizes", [UNEVEN, [5], [1, 1]], ids=["uneven", "one", "two"])
def test_every_epoch_has_every_sample_once_in_another_order(sizes: list[int], window: int, parts: int) -> None:
    order = sampler(sizes, window=window, num_canonical_ranks=parts)
    epochs = [list(order.order(epoch)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(sum(sizes)))
    if sum(sizes) > 5:
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0] != list(sampler(sizes, window=window, num_canonical_ranks=parts, seed=4).order(0))
    assert list(sampler(sizes, window=window, num_canonical_ranks=parts).order(1)) == epochs[1]
    assert [order.order(1)[k] for k in range(len(order))] == epochs[1]


def test_samples_come_as_they_lie_without_shuffling() -> None:
    assert list(sampler(UNEVEN, shuffle=False).order(2)) == list(range(400))


def test_a_window_reads_few_shards() -> None:
    """And mixes them: neighbours of a shard are rarely neighbours of the order."""
    sizes, window = [100] * 50, 500
    order = np.array(list(sampler(sizes, window=window).order(0)))
    shards = [set((order[start : start + window] // 100).tolist()) for start in range(0, 5000, window)]
    assert max(map(len, shards)) == 5
    assert len(set().union(*shards)) == 50
    assert (np.abs(np.diff(order)) == 1).mean() < 0.02


def test_places_of_samples_are_even_over_epochs() -> None:
    """Chi-square of the place of each of 20 samples in 4 shards over 1,000 epochs, all within what chance gives."""
    places = np.array(list(sampler([5] * 4, num_samples=20 * 1000).order(0))).reshape(1000, 20)
    counts = np.array([np.bincount(places[:, place], minlength=20) for place in range(20)])
    chi = ((counts - 50.0) ** 2 / 50).sum(1)
    assert chi.max() < 50  # of 19 degrees of freedom
    assert 19 * 0.6 < chi.mean() < 19 * 1.4


@pytest.mark.parametrize("ranks", [8, 4, 2])
def test_a_canonical_rank_reads_shards_of_its_own(ranks: int) -> None:
    """On any number of data ranks that divides theirs; the order is one and the same."""
    sizes = [100] * 64
    order = sampler(sizes, window=200, num_canonical_ranks=8).order(1)
    shards = [set((np.array(list(order[rank::ranks])) // 100).tolist()) for rank in range(ranks)]
    for one, other in itertools.combinations(shards, 2):
        assert not one & other
    whole = sampler(sizes, window=200).order(1)
    assert len(set((np.array(list(whole[::ranks])) // 100).tolist())) == 64


def test_a_mixture_has_its_weights_and_repeats_no_sample_before_all_have_come() -> None:
    order = sampler([30, 20, 50], [10, 5], weights=(0.8, 0.2), num_samples=250)
    samples = np.array(list(order.order(0)))
    assert (samples < 100).sum() == 200
    for source, size in ((samples[samples < 100], 100), (samples[samples >= 100], 15)):
        for start in range(0, len(source) - size + 1, size):
            assert len(set(source[start : start + size].tolist())) == size


def test_orders_of_several_keys_are_those_of_each() -> None:
    shuffle = ShardShuffle(UNEVEN, 50, 3)
    places, keys = np.arange(300), np.array([5, 9, 7] * 100, np.uint64)
    together = shuffle(places, keys)
    for key in (5, 7, 9):
        mine = keys == key
        assert together[mine].tolist() == shuffle(places[mine], keys[mine]).tolist()


def loader(batch_size: int = 2, drop_last: bool = False, **options: Any) -> DataLoader:
    data = Numbers(UNEVEN[:5], UNEVEN[5:]) if "weights" in options else Numbers(UNEVEN)
    order = ShardSampler(cast(ShardDataset, data), seed=3, window=50, **options)
    return DataLoader(data, batch_size, sampler=order, drop_last=drop_last)


class OnRanks:
    """Training on so many data ranks, from a place in an epoch on; what all ranks took of it."""

    def __init__(self, num_ranks: int, epoch: int, taken: int, states: list[Any] | None, **options: Any) -> None:
        self.ranks = []
        for rank in range(num_ranks):
            data = TrainingData(shard_loader(loader(**options), num_ranks, rank, TRAINING), num_ranks, rank, lambda: 1)
            data.begin(epoch, taken, states)
            self.ranks.append(data)
        self.iterators = [iter(data.loader) for data in self.ranks]
        self.given = 0

    def take(self, steps: int | None = None) -> list[int]:
        """So many batches of every rank, or all that are left."""
        seen: list[int] = []
        while steps is None or steps:
            batches = [next(iterator, None) for iterator in self.iterators]
            if batches[0] is None:
                break
            assert None not in batches
            seen += torch.stack(cast(list[Tensor], batches)).t().flatten().tolist()
            self.given += 1
            steps = None if steps is None else steps - 1
        return seen

    def place(self) -> tuple[int, list[Any]]:
        return self.ranks[0].taken(self.given, False), [data.state(self.given, False, False) for data in self.ranks]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_canonical_ranks": 8}, {"weights": (2.0, 1.0), "num_samples": 320}],
    ids=["all", "canonical", "mixture"],
)
def test_eight_then_two_then_eight_data_ranks_repeat_and_skip_nothing(options: dict[str, Any]) -> None:
    """The samples in their order are those of a run that never stopped, into the next epoch."""
    order = cast(ShardSampler, loader(**options).sampler)
    epochs = [list(order.order(epoch)) for epoch in range(3)]
    seen, taken, states = [], 0, None
    for num_ranks, steps in ((8, 5), (2, 17), (8, 3), (2, 7)):
        run = OnRanks(num_ranks, 1, taken, states, **options)
        seen += run.take(steps)
        taken, states = run.place()
        assert taken == len(seen)
    last = OnRanks(8, 1, taken, states, **options)
    seen += last.take()
    assert seen == epochs[1]
    assert OnRanks(2, 2, 0, last.place()[1], **options).take() == epochs[2]
