"""Iterable data: where every rank reads the same, each sample is used once; sharded by its owner, it is left alone."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_dist.data import DistributedStream, shard_stream
from tests.data.strategies import layouts, strategy_of
from tests.support import models
from tests.support.parity import QUIET, Losses, once, whole_weights
from tests.support.ranks import RankError, run_on_ranks


class Plain(IterableDataset):  # type: ignore[type-arg]
    """As written for one process: shuffles, and divides among the workers if there are any."""

    def __init__(self, count: int, sized: bool = False) -> None:
        self.count, self.epochs = count, 0
        if sized:
            self.__class__ = Sized

    def __iter__(self) -> Iterator[Any]:
        self.epochs += 1
        order = list(range(self.count))
        random.Random(self.epochs).shuffle(order)
        worker = get_worker_info()
        samples: Any = models.samples(self.count)
        for index in order if worker is None else order[worker.id :: worker.num_workers]:
            x, y = samples[index]
            yield x, y, index


class Sized(Plain):
    def __len__(self) -> int:
        return self.count


class ByRank(Plain):
    """Sharded by its owner, by global rank."""

    def __iter__(self) -> Iterator[Any]:
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        yield from [sample for index, sample in enumerate(super().__iter__()) if index % world == rank]


class ByHalf(Plain):
    """Sharded over two halves of the ranks."""

    def __iter__(self) -> Iterator[Any]:
        yield from [s for index, s in enumerate(super().__iter__()) if index % 2 == torch.distributed.get_rank() // 2]


class Batches:
    """A loader, and no DataLoader."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class Reads(models.Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.read: list[list[int]] = []
        self.evaluated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.read.append(batch[2].tolist())
        return super().training_step(batch[:2], batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated += batch[2].tolist()
        super().validation_step(batch[:2], batch_idx)


def fit(
    layout: str | None, kind: type[Plain], workers: int, own_loader: bool = False, **options: Any
) -> dict[str, Any]:
    L.seed_everything(1, verbose=False)
    world = torch.distributed.get_world_size() if layout else 1
    losses, module = Losses(), Reads()
    trainer = L.Trainer(
        **{**QUIET, "max_epochs": 2, "num_sanity_val_steps": 0, **options},
        devices=world, strategy=strategy_of(layout), callbacks=[losses],
    )  # fmt: skip
    ranks = trainer.strategy.num_data_ranks if layout else 1  # type: ignore[attr-defined]
    loader: Any = DataLoader(kind(32), batch_size=8 // ranks, num_workers=workers)
    if own_loader:
        loader = Batches(loader)
    trainer.fit(module, loader, DataLoader(kind(22), batch_size=4))
    return {
        "losses": losses.losses,
        "read": module.read,
        "evaluated": module.evaluated,
        "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "weights": whole_weights(module),
        "batches": trainer.num_training_batches,
    }


@pytest.mark.parametrize(("layout", "num_ranks"), layouts("dp_replicate=2", "dp_shard=2"))
@pytest.mark.parametrize("kind", [Plain, Sized])
def test_a_stream_that_nobody_shards_is_read_as_in_one_process(layout: str, num_ranks: int, kind: type[Plain]) -> None:
    one = once(fit, None, kind, 0)
    ranks = run_on_ranks(num_ranks, fit, layout, kind, 0)
    for rank in ranks:
        torch.testing.assert_close(rank["losses"], one["losses"], rtol=1e-5, atol=1e-6)
        assert rank["logged"] == pytest.approx(one["logged"], rel=1e-4)
        assert rank["batches"] == one["batches"]
        for name, weight in one["weights"].items():
            difference = rank["weights"][name] - weight
            assert difference.norm() <= 1e-4 * weight.norm(), name
    data_ranks = ranks[:1] if layout == "tp=2" else ranks
    assert sorted(index for rank in data_ranks for index in rank["evaluated"]) == sorted(one["evaluated"])


def test_a_loader_of_the_users_own_kind_is_dealt_too() -> None:
    one = once(fit, None, Plain, 0, True)
    for rank in run_on_ranks(2, fit, "dp_replicate=2", Plain, 0, True):
        torch.testing.assert_close(rank["losses"], one["losses"], rtol=1e-5, atol=1e-6)


def test_with_workers_each_sample_is_used_once() -> None:
    ranks = run_on_ranks(2, fit, "dp_replicate=2", Plain, 2)
    for epoch in (slice(0, 4), slice(4, 8)):
        read = [index for rank in ranks for batch in rank["read"][epoch] for index in batch]
        assert sorted(read) == list(range(32))


def test_what_its_owner_shards_is_left_alone() -> None:
    ranks = run_on_ranks(2, fit, "dp_replicate=2", ByRank, 0)
    read = [index for rank in ranks for batch in rank["read"][:4] for index in batch]
    assert sorted(read) == list(range(32))


def _undealt_on_purpose() -> Any:
    return fit("dp_replicate=2", Plain, 0, use_distributed_sampler=False)["read"]


def test_the_trainers_word_that_the_user_shards_is_taken() -> None:
    first, second = run_on_ranks(2, _undealt_on_purpose)
    assert first == second
    assert len(first) == 16


def test_a_stream_that_is_dealt_to_some_ranks_is_refused_on_all() -> None:
    with pytest.raises(RankError) as error:
        run_on_ranks(4, fit, "dp_replicate=2,dp_shard=2", ByHalf, 0)
    assert str(error.value).count("read the same and others") >= 4


COUNT = 16


class Numbers(IterableDataset):  # type: ignore[type-arg]
    """Of one process."""

    def __iter__(self) -> Iterator[Any]:
        yield from range(COUNT)


class ItsOwnIterator(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        self.next = 0
        return self

    def __next__(self) -> int:
        if self.next == COUNT:
            raise StopIteration
        self.next += 1
        return self.next - 1


class OfWorkers(IterableDataset):  # type: ignore[type-arg]
    """Reads in workers only."""

    def __iter__(self) -> Iterator[Any]:
        worker: Any = get_worker_info()
        yield from range(worker.id, COUNT, worker.num_workers)


class Images(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        for number in range(COUNT):
            yield Image.fromarray(np.full((4, 4), number, dtype=np.uint8))


class Samples(IterableDataset):  # type: ignore[type-arg]
    """Objects that show where they lie in memory."""

    class Sample:
        def __init__(self, number: int) -> None:
            self.number = number

    def __iter__(self) -> Iterator[Any]:
        yield from map(self.Sample, range(COUNT))


class Words(IterableDataset):  # type: ignore[type-arg]
    """Sets of texts, whose order is another one in each process."""

    def __iter__(self) -> Iterator[Any]:
        for number in range(COUNT):
            yield _Shuffled(["a", "b", "c", str(number)])


class _Shuffled(frozenset):  # type: ignore[type-arg]
    """In another order on each rank, as sets of texts are in processes with hashes of their own."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__(), reverse=bool(torch.distributed.get_rank())))

    def __reduce__(self) -> Any:
        return frozenset, (list(self),)

    @property
    def number(self) -> int:
        return next(int(word) for word in self if word.isdecimal())


class FramedByRank(IterableDataset):  # type: ignore[type-arg]
    """Sharded by its owner; arrays differ within a black frame only."""

    def __iter__(self) -> Iterator[Any]:
        for number in range(torch.distributed.get_rank(), COUNT, 2):
            frame = np.zeros((64, 64))
            frame[32, 32] = number
            yield frame


class Begun(Numbers):
    """``worker_init_fn`` shards it."""

    first, step = 0, 1

    def __iter__(self) -> Iterator[Any]:
        yield from range(self.first, COUNT, self.step)


def _by_worker(number: int) -> None:
    torch.set_num_threads(3)
    worker: Any = get_worker_info()
    worker.dataset.step = 2 * worker.num_workers
    worker.dataset.first = 2 * number + torch.distributed.get_rank()


def _number(sample: Any) -> int:
    match sample:
        case np.ndarray():
            return int(sample[32, 32])
        case Image.Image():
            return int(np.asarray(sample)[0, 0])
    return getattr(sample, "number", sample)


def _numbers(samples: list[Any]) -> Tensor:
    return torch.tensor([_number(sample) for sample in samples])


def _taken(make: Any) -> tuple[bool, list[int]]:
    """Whether the loader is sharded, and the numbers that this rank gets, in two epochs."""
    rank = torch.distributed.get_rank()
    threads = torch.get_num_threads()
    stream = shard_stream(make(), 2, rank, torch.distributed.group.WORLD, training=True)  # type: ignore[arg-type]
    assert torch.get_num_threads() == threads
    return isinstance(stream, DistributedStream), [n for _ in range(2) for batch in stream for n in batch.tolist()]


def _loader(kind: type[Any], **options: Any) -> DataLoader:  # type: ignore[type-arg]
    return DataLoader(kind(), batch_size=2, collate_fn=_numbers, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ItsOwnIterator, {}),
        (Images, {}),
        (Samples, {}),
        (Words, {}),
        (OfWorkers, {"num_workers": 1}),
    ],
)
def test_what_is_written_for_one_process_is_sharded_whatever_it_yields(kind: type[Any], options: Any) -> None:
    (first, mine), (second, others) = run_on_ranks(2, _taken, partial(_loader, kind, **options))
    assert first
    assert second
    assert sorted(mine + others) == sorted(2 * list(range(COUNT)))


@pytest.mark.parametrize(
    ("kind", "options"), [(FramedByRank, {}), (Begun, {"num_workers": 2, "worker_init_fn": _by_worker})]
)
def test_what_its_owner_shards_is_not_sharded_again(kind: type[Any], options: Any) -> None:
    (first, mine), (second, others) = run_on_ranks(2, _taken, partial(_loader, kind, **options))
    assert not first
    assert not second
    assert sorted(mine + others) == sorted(2 * list(range(COUNT)))


def _generator() -> Iterator[Tensor]:
    yield from torch.arange(COUNT).split(2)


def _iterator() -> Iterator[Tensor]:
    return iter(torch.arange(COUNT).split(2))


def _warned(make: Any) -> tuple[bool, list[int], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_sharded, numbers = _taken(make)
    return is_sharded, numbers, [str(warning.message) for warning in caught]


def test_of_an_iterator_a_copy_is_looked_at() -> None:
    (first, mine), (second, others) = run_on_ranks(2, _taken, _iterator)
    assert first
    assert second
    assert sorted(mine + others) == list(range(COUNT))


def test_what_can_not_be_looked_at_is_left_alone_with_a_warning() -> None:
    for is_sharded, numbers, _ in (ranks := run_on_ranks(2, _warned, _generator)):
        assert not is_sharded
        assert numbers == list(range(COUNT))
    assert "whether data ranks read the same of generator can't be seen" in ranks[0][2][0]
