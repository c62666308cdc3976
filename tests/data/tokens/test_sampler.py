"""The order of blocks: of all data ranks together, from seed and epoch, and from where a run was stopped."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_dist import HybridStrategy
from lightning_dist.data import TokenDataset, TokenSampler, TrainingData, shard_loader
from lightning_dist.data.mixtures import PERIOD
from lightning_dist.data.permutation import RUN
from tests.data.tokens.stores import numbered
from tests.support.parity import QUIET
from tests.support.ranks import run_on_ranks

TRAINING = RunningStage.TRAINING


class Numbers(Dataset):
    """In place of blocks, their indices."""

    def __init__(self, *sizes: int) -> None:
        self.blocks_of_stores = list(sizes)

    def __len__(self) -> int:
        return sum(self.blocks_of_stores)

    def __getitem__(self, index: int) -> int:
        return index


def sampler(*sizes: int, **options: Any) -> TokenSampler:
    return TokenSampler(cast(TokenDataset, Numbers(*sizes)), **{"seed": 3, **options})


@pytest.mark.parametrize("size", [1, 2, 1000, 3 * 512, 5000])
@pytest.mark.parametrize("window", [1, 512, 1 << 16])
def test_every_epoch_has_every_block_once_in_another_order(size: int, window: int) -> None:
    order = sampler(size, window=window)
    epochs = [list(order.order(epoch)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    if size > 2:
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0] != list(sampler(size, window=window, seed=4).order(0))
    assert list(sampler(size, window=window).order(1)) == epochs[1]
    order.set_epoch(2)
    assert list(order) == epochs[2]
    assert len(order) == size


def test_a_window_reads_few_runs_of_the_store() -> None:
    """And mixes them: neighbours of the store are rarely neighbours of the order."""
    size, window = 200 * RUN, 16 * RUN
    order = np.array(list(sampler(size, window=window).order(0)))
    for start in range(0, size - window, window):
        blocks = np.sort(order[start : start + window])
        assert (np.diff(blocks) > 1).sum() <= window // RUN + 1
    assert (np.abs(np.diff(order)) == 1).mean() < 0.01
    assert np.array_equal(list(sampler(size, shuffle=False).order(4)), np.arange(size))


def test_places_of_blocks_are_even_over_epochs() -> None:
    """Chi-square of the place of each of 20 blocks over 4,000 epochs, all within what chance gives."""
    places = np.array(list(sampler(20, num_samples=20 * 4000).order(0))).reshape(4000, 20)
    counts = np.array([np.bincount(places[:, place], minlength=20) for place in range(20)])
    chi = ((counts - 200.0) ** 2 / 200).sum(1)
    assert chi.max() < 50  # of 19 degrees of freedom
    assert 19 * 0.6 < chi.mean() < 19 * 1.4


def test_a_mixture_has_its_weights_and_repeats_no_block_before_all_have_come() -> None:
    sizes, weights = (3000, 100, 700), (0.7, 0.1, 0.2)
    order = sampler(*sizes, weights=weights, num_samples=2500)
    blocks = np.array(list(itertools.chain(*(order.order(epoch) for epoch in range(4)))))
    sources = np.searchsorted([3000, 3100], blocks, side="right")
    for source, weight in enumerate(weights):
        running = np.cumsum(sources == source)
        wanted = weight * np.arange(1, len(blocks) + 1)
        assert np.abs(running - wanted).max() <= 1.5, source  # evenly, from the first on
        mine = blocks[sources == source]
        passes = [mine[start : start + sizes[source]] for start in range(0, len(mine), sizes[source])]
        for each in passes:
            assert len(set(each.tolist())) == len(each)
        if len(passes) > 2:
            assert sorted(passes[0]) == sorted(passes[1])
            assert passes[0].tolist() != passes[1].tolist()


def test_a_mixture_has_exact_shares_in_every_period() -> None:
    order = sampler(50_000, 50_000, weights=(3, 1), num_samples=2 * PERIOD).order(0)
    for start in (0, PERIOD):
        part = np.array(list(order[start : start + PERIOD]))
        assert (part < 50_000).sum() == 3 * PERIOD // 4


def test_weights_that_can_not_be_are_refused() -> None:
    for weights, match in (((1,), "each of the 2"), ((1, -1), "positive"), ((1, 1e-9), "leave it out")):
        with pytest.raises(ValueError, match=match):
            sampler(10, 10, weights=weights)
    with pytest.raises(ValueError, match="at least 1"):
        sampler(10, window=0)


def loader(sizes: tuple[int, ...], batch_size: int = 2, drop_last: bool = False, **options: Any) -> DataLoader:
    return DataLoader(Numbers(*sizes), batch_size, sampler=sampler(*sizes, **options), drop_last=drop_last)


@pytest.mark.parametrize("drop_last", [True, False])
def test_batches_of_all_ranks_are_the_batch_of_one_process(drop_last: bool) -> None:
    one = [batch.tolist() for batch in loader((100,), 8, drop_last)]
    ranks = [list(shard_loader(loader((100,), 2, drop_last), 4, rank, TRAINING)) for rank in range(4)]
    for step, batch in enumerate(one):
        together = [ranks[index % 4][step].tolist()[index // 4] for index in range(len(batch))]
        assert together == batch
    assert len(ranks[0]) == len(one)


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


@pytest.mark.parametrize("options", [{}, {"weights": (2.0, 1.0), "num_samples": 320}], ids=["all", "mixture"])
def test_eight_then_two_then_eight_data_ranks_repeat_and_skip_nothing(options: dict[str, Any]) -> None:
    """The samples in their order are those of a run that never stopped, into the next epoch."""
    options = {"sizes": (300, 100), **options}
    order = loader(**options).sampler
    epochs = [list(cast(TokenSampler, order).order(epoch)) for epoch in range(3)]
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


def test_an_order_of_ten_billion_blocks_takes_no_memory() -> None:
    data = loader((10**10,), 4)
    tracemalloc.start()
    training = TrainingData(shard_loader(data, 8, 3, TRAINING), 8, 3, lambda: 1)
    training.begin(2, 8 * 4 * 10**6)
    batches = [batch.tolist() for batch in itertools.islice(training.loader, 1000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    order = cast(TokenSampler, data.sampler).order(2)
    assert batches[0] == [order[8 * 4 * 10**6 + 3 + 8 * k] for k in range(4)]
    assert len(training.loader) == 10**10 // 32 + (10**10 % 32 > 0)


def test_another_order_before_the_checkpoint_is_told() -> None:
    run = OnRanks(2, 0, 0, None, sizes=(40,))
    run.take(3)
    taken, states = run.place()
    with pytest.warns(UserWarning, match="can't be drawn again"):
        OnRanks(2, 0, taken, states, sizes=(40,), seed=9).take(1)


# ---------------------------------------------------------------- with a Trainer


class Reads(L.LightningModule):
    """A small language model that notes what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(400, 8), nn.Linear(8, 400))
        self.read: list[list[int]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.read.append(batch["inputs"][:, 0].tolist())
        return nn.functional.cross_entropy(self.net(batch["inputs"]).flatten(0, 1), batch["targets"].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SavesAt(Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def train(store: Path, layout: str | None, path: Path, resume: bool, workers: int = 0) -> list[list[int]]:
    """The first tokens of the blocks of each step; saved after the seventh of the second epoch's twelve."""
    L.seed_everything(5, verbose=False)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    blocks = TokenDataset(store, 8)
    assert len(blocks) == 48
    data = DataLoader(
        blocks, 4 // world, sampler=TokenSampler(blocks), num_workers=workers, persistent_workers=workers > 0
    )
    trainer = L.Trainer(
        **QUIET,
        max_epochs=3,
        devices=world,
        strategy=HybridStrategy(layout) if layout else "auto",
        callbacks=[SavesAt(path, 19)],
    )
    module = Reads()
    trainer.fit(module, data, ckpt_path=path if resume else None, weights_only=False if resume else None)
    return module.read


def test_a_trainer_goes_on_within_an_epoch_and_plain_lightning_reads_the_same(tmp_path: Path) -> None:
    store = numbered(tmp_path / "store", 8 * 48 + 1).path
    plain = train(store, None, tmp_path / "plain.ckpt", False)
    assert len(plain) == 36
    for epoch in range(3):
        assert sorted(itertools.chain(*plain[12 * epoch : 12 * epoch + 12])) == list(range(0, 8 * 48, 8))
    ranks = run_on_ranks(2, train, store, "dp_shard=2", tmp_path / "two.ckpt", False)
    assert together(ranks) == plain
    assert together(run_on_ranks(2, train, store, "dp_shard=2", tmp_path / "two.ckpt", True)) == plain[19:]
    assert train(store, "dp_shard=1", tmp_path / "two.ckpt", True, 1) == plain[19:]


def together(ranks: list[list[list[int]]]) -> list[list[int]]:
    return [list(itertools.chain(*zip(*step, strict=True))) for step in zip(*ranks, strict=True)]
