"""How batches are made: order, samplers, sets without a length, loaders beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, Sampler, WeightedRandomSampler

from tests.user_code.case import Case, evaluated
from tests.user_code.networks import Classifier
from tests.user_code.samples import dataset, loader, val_loader


def shuffled_by_generator(size: int) -> DataLoader:
    return loader(size, shuffle=True, generator=torch.Generator().manual_seed(7))


def weighted(size: int) -> DataLoader:
    generator = torch.Generator().manual_seed(8)
    return loader(size, sampler=WeightedRandomSampler(torch.arange(1.0, 33.0).tolist(), 32, generator=generator))


class Stream(IterableDataset):
    """The points one after the other, by nobody dealt."""

    def __iter__(self) -> Iterator[Any]:
        yield from dataset()


class ByLength(Sampler[list[int]]):
    """A batch sampler that puts samples of a like size together."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.order = dataset().tensors[0].norm(dim=1).argsort().tolist()

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.order), self.size):
            yield self.order[start : start + self.size]

    def __len__(self) -> int:
        return len(self.order) // self.size


class Reversed(Sampler[int]):
    """A sampler of one's own."""

    def __iter__(self) -> Iterator[int]:
        yield from reversed(range(32))

    def __len__(self) -> int:
        return 32


def collated(samples: list[Any]) -> tuple[Tensor, Tensor]:
    """Puts the batch together in another order."""
    x, y = zip(*reversed(samples), strict=True)
    return torch.stack(x) * 2, torch.stack(y)


class TwoLoaders(Classifier):
    """Labelled and unlabelled batches side by side."""

    def loss(self, batch: Any) -> Tensor:
        consistency = (self(batch["unlabelled"][0]) - self(batch["unlabelled"][0] + 0.1)).pow(2).mean()
        return super().loss(batch["labelled"]) + consistency


def two_loaders(size: int) -> CombinedLoader:
    both = {"labelled": loader(size), "unlabelled": DataLoader(dataset(48, seed=6), batch_size=size)}
    return CombinedLoader(both, "max_size_cycle")


class TwoValidations(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", F.cross_entropy(self(batch[0]), batch[1]))


class OwnLoaders(Classifier):
    """Loaders of the module itself, one for every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 8

    def train_dataloader(self) -> Any:
        ranks = getattr(self.trainer.strategy, "num_data_ranks", 1)
        return loader(self.size // ranks, count=32 - 8 * self.current_epoch)


CASES = [
    Case("shuffle_with_generator", Classifier, shuffled_by_generator, trainer={"max_epochs": 2}),
    Case("weighted_sampler", Classifier, weighted, trainer={"max_epochs": 2}),
    Case("own_sampler", Classifier, lambda size: loader(size, sampler=Reversed())),
    Case("batch_sampler", Classifier, lambda size: DataLoader(dataset(), batch_sampler=ByLength(size))),
    Case("collate_fn", Classifier, lambda size: loader(size, collate_fn=collated)),
    Case("uneven_last_batch", Classifier, lambda size: loader(size, count=28), trainer={"max_epochs": 2}),
    Case("drop_last", Classifier, lambda size: loader(size, count=30, drop_last=True), trainer={"max_epochs": 2}),
    Case(
        "set_that_does_not_divide",
        Classifier,
        lambda size: loader(size, count=30),
        like="ddp",
        note="as ddp: filled up from its start",
    ),
    Case("iterable", Classifier, lambda size: DataLoader(Stream(), batch_size=size)),
    Case("combined_loaders", TwoLoaders, two_loaders),
    Case("two_validation_loaders", TwoValidations, val=lambda _: [val_loader(), val_loader(20)]),
    Case("uneven_validation", Classifier, val=lambda _: val_loader(18)),
    Case(
        "limited_batches",
        Classifier,
        val=evaluated,
        trainer={"limit_val_batches": 2, "limit_train_batches": 3, "max_epochs": 2},
    ),
    Case("limited_fraction", Classifier, val=lambda _: val_loader(32), trainer={"limit_val_batches": 0.5}),
    Case("validated_within_epoch", Classifier, val=evaluated, trainer={"val_check_interval": 2}),
    Case(
        "loaders_of_the_module",
        OwnLoaders,
        lambda _: None,
        trainer={"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2},
    ),
]
