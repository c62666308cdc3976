"""A run that goes on from a checkpoint within an epoch goes on as if it had never stopped."""

from __future__ import annotations

import itertools
import os
import random
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_dist import HybridStrategy
from lightning_dist.data.resumable import Resumable
from tests.support import models
from tests.support.parity import QUIET, once, slow
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

SIZE = 44


class Augmented(Dataset):
    """Samples with their number; drawn with torch, numpy and Python alike."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(models.WIDTH, generator=generator)
        x = x + 0.1 * torch.randn(models.WIDTH) + 0.1 * float(np.random.rand()) + 0.1 * random.random()
        return x, torch.tensor(index % models.CLASSES), index


class Stream(IterableDataset):
    """Deals its samples itself, and may know where it is."""

    def __init__(self, data_rank: int, num_data_ranks: int) -> None:
        self.data_rank, self.num_data_ranks, self.data = data_rank, num_data_ranks, Augmented()

    def __iter__(self) -> Any:
        for index in self.indices:
            yield self.data[index]

    @property
    def indices(self) -> range:
        return range(self.data_rank, SIZE - SIZE % self.num_data_ranks, self.num_data_ranks)


class Stateful(Stream):
    position = 0

    def __iter__(self) -> Any:
        start, self.position = self.position, 0
        for position, index in enumerate(self.indices[start:], start + 1):
            self.position = position
            yield self.data[index]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class ShuffledStream(Stream):
    """As written for one process."""

    def __iter__(self) -> Any:
        for index in torch.randperm(SIZE).tolist():
            yield self.data[index]


class EagerStream(Stream):
    """Draws when it is asked for an iterator, not for the first sample."""

    def __iter__(self) -> Any:
        return iter([self.data[index] for index in torch.randperm(SIZE).tolist()])


class CountingStream(Stream):
    epochs = 0

    def __iter__(self) -> Any:
        self.epochs += 1
        for index in random.Random(self.epochs).sample(range(SIZE), SIZE):
            yield self.data[index]


class DrawingStream(Stream):
    """From a generator of its own."""

    def __init__(self, data_rank: int, num_data_ranks: int) -> None:
        super().__init__(data_rank, num_data_ranks)
        self.random = np.random.default_rng(3)

    def __iter__(self) -> Any:
        for index in self.random.permutation(SIZE).tolist():
            yield self.data[index]


class HidingStream(Stream):
    """Draws from a state that nobody sees."""

    def __init__(self, data_rank: int, num_data_ranks: int) -> None:
        super().__init__(data_rank, num_data_ranks)
        self.random = [random.Random(3)]

    def __iter__(self) -> Any:
        for index in self.random[0].sample(range(SIZE), SIZE):
            yield self.data[index]


class Dropping(models.Classifier):
    """With dropout and BatchNorm, or another norm."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(models.WIDTH, 32), norm(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, models.CLASSES)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))


class Watch(Callback):
    """Notes the samples and the loss of every batch; saves after so many, of all epochs."""

    saves_after = True

    def __init__(self, path: Path | None = None, batches: int = 0) -> None:
        self.path, self.batches = path, batches
        self.seen: list[tuple[int, list[int]]] = []
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        numbers = batch[2].tolist() if isinstance(batch[0], Tensor) else [part and part[2].tolist() for part in batch]
        self.seen.append((trainer.current_epoch, numbers))
        self.losses.append(float(outputs["loss"]))
        if self.saves_after and self.path is not None and len(self.seen) == self.batches:
            trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.path is not None and not self.batches:
            trainer.save_checkpoint(self.path)


class Endless(Stream):
    """Goes on where the epoch before ended; its state is one dictionary that it changes."""

    def __init__(self, *ranks: int) -> None:
        super().__init__(*ranks)
        self.state = {"position": 0}

    def __iter__(self) -> Any:
        while True:
            self.state["position"] += 1
            yield self.data[self.indices[(self.state["position"] - 1) % len(self.indices)]]

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = dict(state)


def endless() -> DataLoader:
    return streamed(kind=Endless)


def torchdata_endless() -> StatefulDataLoader:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return StatefulDataLoader(Endless(rank, world), batch_size=2)


def dealt_by_the_user(batch_size: int = 2) -> DataLoader:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sampler = DistributedSampler(Augmented(), world, rank)
    return DataLoader(Augmented(), batch_size=batch_size, sampler=sampler)


class EarlyWatch(Watch):
    """Saves before so many batches, counted from 0, when the next one is there and its step is not begun."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.path is not None and len(self.seen) == self.batches:
            trainer.save_checkpoint(self.path)

    saves_after = False


class EpochWatch(EarlyWatch):
    """Saves at the start of the epoch that comes after so many batches."""

    def on_train_batch_start(self, *_: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.path is not None and len(self.seen) == self.batches:
            trainer.save_checkpoint(self.path)


class ValidationWatch(EarlyWatch):
    """Saves after the validation that comes after so many batches."""

    def on_train_batch_start(self, *_: Any) -> None:
        pass

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.path is not None and len(self.seen) == self.batches and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)


class FirstWatch(EarlyWatch):
    """Saves before anything was done."""

    def on_train_batch_start(self, *_: Any) -> None:
        pass

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.path is not None:
            trainer.save_checkpoint(self.path)

    def on_train_end(self, *_: Any) -> None:
        pass


def shuffled(workers: int = 0, batch_size: int = 2) -> DataLoader:
    return DataLoader(Augmented(), batch_size=batch_size, shuffle=True, num_workers=workers)


def sorted_batches(workers: int = 0, batch_size: int = 2) -> DataLoader:
    batches = BatchSampler(RandomSampler(Augmented()), batch_size, drop_last=False)
    return DataLoader(Augmented(), batch_sampler=batches, num_workers=workers)


def streamed(workers: int = 0, batch_size: int = 2, kind: type[Stream] = Stream) -> DataLoader:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return DataLoader(kind(rank, world), batch_size=batch_size, num_workers=workers)


def stateful(workers: int = 0, batch_size: int = 2) -> DataLoader:
    return streamed(workers, batch_size, Stateful)


class Pairs(Dropping):
    """On a batch of each of two loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = [super(Pairs, self).training_step(part, batch_idx) for part in batch if part is not None]
        return torch.stack(losses).sum()


class Iterating(Dropping):
    """Takes its batches itself."""

    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


def long_and_short() -> list[DataLoader]:
    return [shuffled(), DataLoader(Subset(Augmented(), range(16)), batch_size=2, shuffle=True)]


def combined(mode: str) -> CombinedLoader:
    return CombinedLoader(long_and_short(), mode)


def train(
    layout: str,
    loader: Any,
    saves: tuple[Path, int] | None = None,
    resumes: Path | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[list[Any], list[float], dict[str, Tensor], int]:
    """What was seen, the losses, the final buffers, and Lightning's count of steps."""
    L.seed_everything(1, verbose=False)
    options = dict(options or {})
    module = options.pop("module", Dropping)(options.pop("norm", nn.BatchNorm1d))
    world = dist.get_world_size() if dist.is_initialized() else 1
    watch = options.pop("watch", Watch)(*saves or ())
    settings: dict[str, Any] = {"max_epochs": 3, **options}
    whole: Any = {"pipeline_schedule": "GPipe", "num_microbatches": 1} if "pp" in layout else {}  # for BatchNorm
    strategy = HybridStrategy(layout, **whole)
    trainer = L.Trainer(**QUIET, devices=world, strategy=strategy, callbacks=[watch], **settings)
    trainer.fit(module, loader(), DataLoader(models.few_samples(), batch_size=4), ckpt_path=resumes)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return watch.seen, watch.losses, buffers, trainer.global_step


def on(layout: str, *args: Any) -> list[Any]:
    if "=2" not in layout:
        return [train(layout, *args)]
    return run_on_ranks(4 if "," in layout else 2, train, layout, *args)


def workers_shuffled() -> DataLoader:
    return shuffled(2)


def workers_sorted() -> DataLoader:
    return sorted_batches(2)


def workers_streamed() -> DataLoader:
    return streamed(1)


def torchdata_shuffled(workers: int = 0) -> StatefulDataLoader:
    return StatefulDataLoader(Augmented(), batch_size=2, shuffle=True, num_workers=workers)


def torchdata_workers() -> StatefulDataLoader:
    return torchdata_shuffled(2)


def torchdata_stream(workers: int = 0) -> StatefulDataLoader:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return StatefulDataLoader(Stateful(rank, world), batch_size=2, num_workers=workers)


def torchdata_stream_worker() -> StatefulDataLoader:
    return torchdata_stream(1)


class Ordered(Sampler[int]):
    """Draws from a state that nobody sees, or with an odd seed from another one in each process."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed if seed % 2 == 0 else os.urandom(8))

    def __iter__(self) -> Any:
        return iter(self.random.sample(range(SIZE), SIZE))

    def __len__(self) -> int:
        return SIZE


def ordered(seed: int = 2) -> DataLoader:
    return DataLoader(Augmented(), batch_size=2, sampler=Ordered(seed))


def with_generator() -> DataLoader:
    return DataLoader(Augmented(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(5))


def with_other_generators() -> DataLoader:
    """Seeded apart on each rank, as torchdata's are in scripts that seed nothing."""
    seed = dist.get_rank() if dist.is_initialized() else 0
    return DataLoader(Augmented(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(seed))


TORCHDATA = [torchdata_shuffled, torchdata_workers, torchdata_stream]
OWN_ORDER = [ordered, with_generator]
LOADERS = [
    *(shuffled, workers_shuffled, sorted_batches, workers_sorted, streamed, workers_streamed, stateful),
    *TORCHDATA,
    *OWN_ORDER,
]


def few_and_many(cases: list[tuple[Any, ...]], often: set[tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(*case, marks=() if case in often else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    ("layout", "loader", "batches"),
    few_and_many(
        list(itertools.product(["dp_shard=1", "dp_replicate=2"], LOADERS, [14, 22])),
        {("dp_replicate=2", x, 14) for x in (sorted_batches, streamed, stateful, torchdata_workers, ordered)},
    ),
)
def test_a_run_that_goes_on_within_an_epoch_is_the_same_to_the_bit(
    layout: str, loader: Any, batches: int, tmp_path: Path
) -> None:
    check(layout, loader, batches, tmp_path, {})


@pytest.mark.parametrize(
    ("layout", "batches"),
    few_and_many(
        list(itertools.product(["dp_shard=1", "dp_shard=2", "pp=2,dp_replicate=2"], [13, 14, 15, 22])),
        {("dp_shard=1", 15), ("dp_shard=2", 13), ("dp_shard=2", 14), ("pp=2,dp_replicate=2", 13)},
    ),
)
def test_it_goes_on_from_the_last_step_where_gradients_add_up(layout: str, batches: int, tmp_path: Path) -> None:
    check(layout, shuffled, batches, tmp_path, {"accumulate_grad_batches": 3})


@pytest.mark.parametrize("layout", ["dp_replicate=2", pytest.param("dp_shard=1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("batches", [14, 20])  # where the shorter loader is within its first and its second turn
def test_several_loaders_go_on_each_where_it_was(layout: str, batches: int, tmp_path: Path) -> None:
    check(layout, long_and_short, batches, tmp_path, {"module": Pairs})


@pytest.mark.parametrize(("mode", "batches"), [("min_size", 3), ("max_size", 12)])
def test_combined_loaders_go_on_each_where_it_was(mode: str, batches: int, tmp_path: Path) -> None:
    check("dp_shard=1", partial(combined, mode), batches, tmp_path, {"module": Pairs})


@pytest.mark.parametrize("loader", [endless, torchdata_endless])
@pytest.mark.parametrize("batches", [2, 3, 4, 6])  # within an epoch of 3, and at its end
def test_a_stream_that_never_ends_goes_on(loader: Any, batches: int, tmp_path: Path) -> None:
    check("dp_shard=1", loader, batches, tmp_path, {"limit_train_batches": 3})


def of_one_process(kind: type[Stream], workers: int = 0) -> DataLoader:
    return DataLoader(kind(0, 1), batch_size=2, num_workers=workers)


@pytest.mark.parametrize(
    ("layout", "kind", "workers", "batches"),
    few_and_many(
        list(
            itertools.product(
                ["dp_shard=1", "dp_replicate=2"],
                [ShuffledStream, EagerStream, CountingStream, DrawingStream],
                [0, 1],
                [14, 22],
            )
        ),
        {
            ("dp_shard=1", ShuffledStream, 0, 14),
            ("dp_replicate=2", ShuffledStream, 0, 14),
            ("dp_shard=1", EagerStream, 0, 14),
            ("dp_replicate=2", CountingStream, 0, 14),
            ("dp_replicate=2", DrawingStream, 0, 22),
            ("dp_shard=1", CountingStream, 0, 22),
        },
    ),
)
def test_a_stream_that_shuffles_goes_on_in_its_order(
    layout: str, kind: type[Stream], workers: int, batches: int, tmp_path: Path
) -> None:
    check(layout, partial(of_one_process, kind, workers), batches, tmp_path, {})


def test_a_stream_that_draws_at_once_has_another_order_in_each_epoch() -> None:
    loader = Resumable(of_one_process(EagerStream), lambda: 2)
    first, second = ([index for batch in loader for index in batch[2].tolist()] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(SIZE))
    assert first != second


def test_a_stream_that_can_not_be_read_again_is_told(tmp_path: Path) -> None:
    train("dp_shard=1", partial(of_one_process, HidingStream), (tmp_path / "a.ckpt", 30))
    with pytest.warns(UserWarning, match="can't be read again: other data, or HidingStream goes by a state"):
        train("dp_shard=1", partial(of_one_process, HidingStream), None, tmp_path / "a.ckpt")


@pytest.mark.parametrize("loader", [dealt_by_the_user, stateful, streamed])
def test_loaders_of_their_own_go_on_from_the_last_step(loader: Any, tmp_path: Path) -> None:
    check("dp_shard=1", loader, 14, tmp_path, {"accumulate_grad_batches": 3})


def test_the_state_of_a_stream_is_kept_for_all_batches_whose_gradients_add_up(tmp_path: Path) -> None:
    options = {"limit_train_batches": 150, "accumulate_grad_batches": 70, "max_epochs": 1}
    check("dp_shard=1", endless, 139, tmp_path, options)


@pytest.mark.parametrize(("loading", "batch_size"), [("dp_shard=1", 4), ("dp_shard=1", 2), ("dp_replicate=2", 4)])
def test_samples_that_the_user_deals_are_taken_once_by_other_ranks(
    loading: str, batch_size: int, tmp_path: Path
) -> None:
    first = on("dp_replicate=2", dealt_by_the_user, (tmp_path / "a.ckpt", 4), None, {"max_epochs": 1})
    second = on(loading, partial(dealt_by_the_user, batch_size), None, tmp_path / "a.ckpt", {"max_epochs": 1})
    samples = [seen[:4] for seen, *_ in first] + [seen for seen, *_ in second]
    assert sorted(i for seen in samples for _, batch in seen for i in batch) == list(range(SIZE))


def test_a_place_between_two_batches_of_the_user_is_refused(tmp_path: Path) -> None:
    on("dp_replicate=2", dealt_by_the_user, (tmp_path / "a.ckpt", 3), None, {"max_epochs": 1})
    with pytest.raises(ValueError, match=r"had taken 12 samples of the epoch.*1 data ranks and batches of 8"):
        train("dp_shard=1", partial(dealt_by_the_user, 8), None, tmp_path / "a.ckpt")


def limit_of(loader: Any) -> dict[str, int]:
    return {"limit_train_batches": 22} if loader is endless else {}


EVERY_KIND = [shuffled, workers_shuffled, ordered, with_generator, stateful, endless, dealt_by_the_user]


@pytest.mark.parametrize("loader", EVERY_KIND)
@pytest.mark.parametrize("batches", [5, 21, 22])  # within the first epoch, before its last batch, before the next one
def test_a_checkpoint_before_a_batch_goes_on_with_it(loader: Any, batches: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"watch": EarlyWatch, "max_epochs": 2, "norm": nn.LayerNorm, **limit_of(loader)}
    whole = train("dp_shard=1", loader, (tmp_path / "a.ckpt", batches), None, options)
    again = train("dp_shard=1", loader, None, tmp_path / "a.ckpt", options)
    assert again[0] == whole[0][batches:]


@pytest.mark.parametrize("ends", [{}, {"max_epochs": -1, "max_steps": 66}], ids=["epochs", "steps"])
@pytest.mark.parametrize("watch", [ValidationWatch, EpochWatch])
@pytest.mark.parametrize("loader", EVERY_KIND)
def test_a_checkpoint_between_epochs_goes_on_with_the_next(
    watch: type[Watch], loader: Any, ends: dict[str, int], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"watch": watch, "norm": nn.LayerNorm, **limit_of(loader), **ends}
    whole = train("dp_shard=1", loader, (tmp_path / "a.ckpt", 22), None, options)
    again = train("dp_shard=1", loader, None, tmp_path / "a.ckpt", options)
    assert again[0] == whole[0][22:]


@pytest.mark.parametrize("loader", EVERY_KIND)
@pytest.mark.parametrize("batches", [14, slow(22)])
def test_a_run_that_goes_on_and_saves_at_once_is_where_it_was(loader: Any, batches: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"norm": nn.LayerNorm, **limit_of(loader)}
    whole = train("dp_shard=1", loader, (tmp_path / "a.ckpt", batches), None, options)
    first = {**options, "watch": FirstWatch}
    train("dp_shard=1", loader, (tmp_path / "b.ckpt", 0), tmp_path / "a.ckpt", first)
    again = train("dp_shard=1", loader, None, tmp_path / "b.ckpt", options)
    assert again[:2] == (whole[0][batches:], whole[1][batches:])


@pytest.mark.parametrize("layout", ["dp_shard=1", "dp_replicate=2"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_that_takes_its_batches_goes_on(layout: str, accumulate: int, tmp_path: Path) -> None:
    check(layout, shuffled, 14, tmp_path, {"module": Iterating, "accumulate_grad_batches": accumulate})


@pytest.mark.parametrize(
    ("saving", "loading", "batch_size", "accumulate"),
    [
        ("dp_replicate=2", "dp_shard=1", 4, 1),
        ("dp_shard=1", "dp_shard=2", 2, 1),
        slow("dp_shard=2", "dp_replicate=2,dp_shard=2", 1, 1),
        ("dp_replicate=2", "dp_shard=1", 2, 2),
        ("dp_replicate=2", "dp_replicate=2", 3, 1),
    ],
)
@pytest.mark.parametrize("loader", [shuffled, pytest.param(sorted_batches, marks=pytest.mark.slow)])
def test_other_ranks_take_the_rest_of_the_epoch_once(
    saving: str, loading: str, batch_size: int, accumulate: int, loader: Any, tmp_path: Path
) -> None:
    saves = tmp_path / "a.ckpt", 5
    first = on(saving, loader, saves, None, {"max_epochs": 1, "norm": nn.LayerNorm})
    world = len(first)
    if loader is sorted_batches:
        batch_size = 2  # whole batches are dealt, so only their size is the same for any ranks
    options = {"accumulate_grad_batches": accumulate, "norm": nn.LayerNorm}
    second = on(loading, partial(loader, batch_size=batch_size), None, saves[0], options)
    by_epoch: dict[int, list[int]] = {}
    for seen, *_ in second:
        for epoch, samples in seen:
            by_epoch.setdefault(epoch, []).extend(samples)
    before = [sample for seen, *_ in first for _, samples in seen[:5] for sample in samples]
    assert len(before) == 10 * world
    rest = set(range(SIZE)) - set(before)
    ranks = len(second)
    assert sorted(by_epoch) == [0, 1, 2]
    fill = batch_size * ranks if loader is sorted_batches else ranks
    for epoch, wanted in ((0, rest), (1, set(range(SIZE))), (2, set(range(SIZE)))):
        taken = Counter(by_epoch[epoch])
        assert set(taken) >= wanted
        assert len(by_epoch[epoch]) - len(wanted) < fill  # as in any epoch, ranks are filled up to the same number


@pytest.mark.parametrize("loading", ["dp_shard=2", "dp_shard=1"])
def test_the_losses_go_on_under_other_ranks(loading: str, tmp_path: Path) -> None:
    one = once(plain, "dp_shard=1", 8, None, None)
    first = plain_on("dp_replicate=2", 4, (tmp_path / "a.ckpt", 5), None)
    rest = plain_on(loading, 4 if "=2" in loading else 8, None, tmp_path / "a.ckpt")
    torch.testing.assert_close([*first[:5], *rest], one, rtol=1e-5, atol=1e-6)


def plain_on(layout: str, *args: Any) -> list[float]:
    return plain(layout, *args) if "=2" not in layout else run_on_ranks(2, plain, layout, *args)[0]


def plain(layout: str, batch_size: int, saves: Any, resumes: Path | None) -> list[float]:
    """The losses of a training without random numbers but the order."""
    L.seed_everything(1, verbose=False)
    world = dist.get_world_size() if dist.is_initialized() else 1
    losses = Losses(*saves) if saves else Losses()
    strategy = HybridStrategy(layout)
    trainer = L.Trainer(**QUIET, devices=world, strategy=strategy, callbacks=[losses], max_epochs=2)
    loader = DataLoader(models.samples(), batch_size=batch_size, shuffle=True)
    trainer.fit(models.Grouped(), loader, ckpt_path=resumes)
    return losses.losses


class Losses(Watch):
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        outputs = {"loss": trainer.strategy.reduce(outputs["loss"].detach().clone())}
        super().on_train_batch_end(trainer, pl_module, outputs, [*batch, torch.zeros(0)], batch_idx)


def test_the_state_of_a_loader_whose_worker_augments_gives_the_same_samples(tmp_path: Path) -> None:
    whole = on("dp_replicate=2", torchdata_stream_worker, (tmp_path / "a.ckpt", 14))
    again = on("dp_replicate=2", torchdata_stream_worker, None, tmp_path / "a.ckpt")
    assert [seen for seen, *_ in again] == [seen[14:] for seen, *_ in whole]


@pytest.mark.parametrize("batches", [14, 22])  # within the second epoch, and at its end
def test_an_order_that_can_not_be_drawn_again_is_told(batches: int, tmp_path: Path) -> None:
    whole = train("dp_shard=1", partial(ordered, 3), (tmp_path / "a.ckpt", batches), None)
    with pytest.warns(
        UserWarning, match="can't be drawn again: other data, or the Ordered draws from a state of its own"
    ):
        again = train("dp_shard=1", partial(ordered, 3), None, tmp_path / "a.ckpt")
    assert len(again[0]) == len(whole[0]) - batches


def test_ranks_deal_one_order_whatever_generators_they_bring() -> None:
    for seen, *_ in (ranks := on("dp_replicate=2", with_other_generators)):
        assert len(seen) == 3 * SIZE // 4
    for epoch in range(3):
        samples = [i for seen, *_ in ranks for number, batch in seen if number == epoch for i in batch]
        assert sorted(samples) == list(range(SIZE))


@pytest.mark.parametrize(("seed", "is_told"), [(2, False), (3, True)])
def test_ranks_that_draw_apart_are_told_at_a_save(seed: int, is_told: bool, tmp_path: Path) -> None:
    told, _ = run_on_ranks(2, _warnings_of, partial(ordered, seed), tmp_path / "a.ckpt")
    assert ("the data ranks drew different orders from the Ordered of training loader 0" in told) == is_told


def _warnings_of(loader: Any, path: Path) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train("dp_replicate=2", loader, (path, 5), None, {"max_epochs": 1})
    return " ".join(str(one.message) for one in caught)


@pytest.mark.parametrize("loader", [ordered, with_generator])
def test_other_ranks_draw_the_order_of_the_sampler_itself(loader: Any, tmp_path: Path) -> None:
    first = on("dp_replicate=2", loader, (tmp_path / "a.ckpt", 14), None, {"norm": nn.LayerNorm})
    seen, *_ = train("dp_shard=1", loader, None, tmp_path / "a.ckpt", {"norm": nn.LayerNorm})
    before = [i for seen, *_ in first for epoch, samples in seen[:14] if epoch == 1 for i in samples]
    after = [i for epoch, samples in seen if epoch == 1 for i in samples]
    assert sorted(before + after) == list(range(SIZE))


def test_max_steps_within_an_epoch_can_be_raised(tmp_path: Path) -> None:
    whole = train("dp_shard=1", shuffled, None, None, {"max_epochs": -1, "max_steps": 60})
    train("dp_shard=1", shuffled, (tmp_path / "a.ckpt", 0), None, {"max_epochs": -1, "max_steps": 30})
    rest = train("dp_shard=1", shuffled, None, tmp_path / "a.ckpt", {"max_epochs": -1, "max_steps": 60})
    assert rest[0] == whole[0][30:]
    assert rest[1] == whole[1][30:]


def test_a_loader_with_a_state_is_refused_within_an_epoch_of_other_ranks(tmp_path: Path) -> None:
    on("dp_replicate=2", stateful, (tmp_path / "a.ckpt", 5))
    with pytest.raises(ValueError, match="the Stateful has a state for each data rank"):
        train("dp_shard=1", stateful, None, tmp_path / "a.ckpt")


def check(layout: str, loader: Any, batches: int, folder: Path, options: dict[str, Any]) -> None:
    whole = on(layout, loader, (folder / "a.ckpt", batches), None, options)
    again = on(layout, loader, None, folder / "a.ckpt", options)
    for (seen, losses, buffers, steps), (seen_again, losses_again, buffers_again, steps_again) in zip(
        whole, again, strict=True
    ):
        count = options.get("accumulate_grad_batches", 1)
        first = len(seen) - len(seen_again)
        assert batches - count < first <= batches
        assert seen_again == seen[first:]
        assert losses_again == losses[first:]
        assert steps_again == steps
        # a save averages the ranks' statistics, which is a rounding if the other run does so at another time
        rounding = 1e-6 if count > 1 else 0
        for name, buffer in buffers.items():
            torch.testing.assert_close(buffers_again[name], buffer, rtol=rounding, atol=rounding, msg=name)
