"""Modules of users, and what ranks are made to do wrong: a maker of a module runs in each of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_dist.data import DistributedBatches
from lightning_dist.parallel.fsdp import FSDPRunner
from lightning_dist.parallel.tensor.equivalence import EquivalenceCheck
from lightning_dist.parallel.tensor.region import Region

WIDTH, CLASSES, TOKENS, LENGTH = 16, 5, 24, 6


class Sentences(Dataset):
    """Dictionaries of tokens, a class, and a name, which a collate function of its own makes batches of."""

    def __init__(self, count: int = 64) -> None:
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(TOKENS, (count, LENGTH), generator=generator)
        self.weight = np.random.default_rng(1).random((count, 1))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": self.tokens[index], "weight": self.weight[index], "name": f"sentence {index}"}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tokens": torch.stack([sample["tokens"] for sample in samples]),
        "names": [sample["name"] for sample in samples],
        "weight": torch.from_numpy(np.concatenate([sample["weight"] for sample in samples])),
        "kind": "sentences",
    }


class Network(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        layer = [nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.1, batch_first=True) for _ in range(2)]
        self.blocks = nn.Sequential(*layer)
        self.batch_norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.batch_norm(self.blocks(self.embedding(tokens)).mean(dim=1)))


class Reader(L.LightningModule):
    """Trains on its own data, with dropout, shuffled."""

    def __init__(self, norm: bool = False, batch_size: int = 4) -> None:
        super().__init__()
        self.network, self.batch_size = Network(norm), batch_size

    def loss(self, batch: dict[str, Any]) -> Tensor:
        classes = batch["tokens"][:, 0] % CLASSES
        each = F.cross_entropy(self.network(batch["tokens"]), classes, reduction="none")
        return (each * batch["weight"]).mean()

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        assert batch["kind"] == "sentences"
        assert len(batch["names"]) == len(batch["tokens"])
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Sentences(), self.batch_size, shuffle=True, collate_fn=collate)


class CountsItsBatch(Reader):
    """Logs how many samples it got."""

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        self.log("samples", float(len(batch["names"])))
        return super().training_step(batch)


class WeighsByRank(Reader):
    """Its loss depends on the rank."""

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        return super().training_step(batch) * (1 + int(os.environ.get("RANK", 0)))


class Augments(Reader):
    """Changes batches on the device, at random, and has other tokens in its second epoch."""

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        batch["tokens"] = (batch["tokens"] + torch.randint_like(batch["tokens"], 5)) % TOKENS
        return batch


class Validated(Reader):
    """Validates on 18 samples, four in a batch: the last of five has two."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))
        self.log("val_weight", batch["weight"].mean(), on_step=True, on_epoch=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Sentences(18), 4, shuffle=True, collate_fn=collate)


class AveragesByHand(Validated):
    """Its validation is the mean of its own batches, of which ranks have other numbers."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.means = [] if batch_idx == 0 else self.means
        self.means.append(self.loss(batch))

    def on_validation_epoch_end(self) -> None:
        self.log("val_mean", torch.stack(self.means).mean())


class ChangesInValidation(Validated):
    """A rank changes a weight when it has validated."""

    def on_validation_end(self) -> None:
        if os.environ.get("RANK") == "1":
            self.network.head.bias.data.add_(1.0)


class NeedsLabels(Validated):
    """Its validation asks for what batches have not."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val_loss", batch["labels"].mean())


class KeepsAStatistic(Reader):
    """A buffer follows the samples of the rank, and no gradient depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("followed", torch.zeros(WIDTH))

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        self.followed.lerp_(self.network.embedding(batch["tokens"]).detach().mean(dim=(0, 1)), 0.1)
        return super().training_step(batch)


class Breaks(Reader):
    """Does not train."""

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        return batch["nothing"]


class Idle(Reader):
    """Skips all steps."""

    def training_step(self, batch: dict[str, Any]) -> None:  # type: ignore[override]
        return None

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Sentences(8), 8, collate_fn=collate)


class BreaksOnRank(Reader):
    """Ends on one of the ranks, while the other waits for it."""

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        if os.environ.get("RANK") == "1" and self.global_step == 1:
            raise KeyError("of the user")
        return super().training_step(batch)


class Hangs(Reader):
    """Never ends where there are two."""

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        while os.environ.get("RANK") == "1":
            time.sleep(1)
        return super().training_step(batch)


class Draws(Reader):
    """Adds noise."""

    def loss(self, batch: dict[str, Any]) -> Tensor:
        return super().loss(batch) * (1 + 0.1 * torch.rand(()))


class Rounds(Reader):
    """Computes a part in float32, as norms of transformers do."""

    def loss(self, batch: dict[str, Any]) -> Tensor:
        return super().loss(batch).float().double()


class Stream(IterableDataset):
    """Batches, dealt to the data ranks, of which every second may be longer."""

    def __init__(self, longer: int) -> None:
        self.longer = longer

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(16):
            tokens = torch.full((2, 3 + index % 2 * self.longer), index)
            yield {"tokens": tokens, "names": ["a", "b"], "weight": torch.ones(2), "kind": "sentences"}


def stream(longer: int = 0) -> DataLoader:
    return DataLoader(Stream(longer), batch_size=None)


class SentencesModule(L.LightningDataModule):
    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Sentences(20), self.batch_size, shuffle=True, collate_fn=collate)


def without_a_bias() -> L.LightningModule:
    """A plan that drops the bias of a feed-forward layer, where no comparison of parts refuses it."""

    def dropping(self: Region, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if isinstance(module, nn.Linear) and module.in_features == 2 * WIDTH:
            self.after = None
        return of_region(self, module, args, kwargs)

    of_region = Region._run
    Region._run = dropping  # type: ignore[method-assign]
    EquivalenceCheck.before_run = lambda *_: None  # type: ignore[method-assign]
    return Biased()


class Biased(Reader):
    """Whose biases are no zeros."""

    def __init__(self) -> None:
        super().__init__()
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(p, std=0.1)


def summed_over_ranks() -> L.LightningModule:
    """Gradients are summed over the shard axis in place of averaged."""

    def summing(self: FSDPRunner, module: nn.Module, *args: Any) -> None:
        of_runner(self, module, *args)
        for child in module.modules():
            if isinstance(child, FSDPModule):
                child.set_gradient_divide_factor(1.0)

    of_runner = FSDPRunner.__init__
    FSDPRunner.__init__ = summing  # type: ignore[method-assign]
    return Reader()


def counts_what_is_repeated() -> L.LightningModule:
    """A rank without a batch left counts the one that it repeats, as under ``ddp``."""
    DistributedBatches.counts = lambda *_: True  # type: ignore[method-assign]
    return Validated()


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 + int(os.environ.get("RANK", 0)))


class WrongBackward(Reader):
    """The gradient that its second block hands back depends on the rank."""

    def __init__(self) -> None:
        super().__init__()
        self.network.blocks[1].norm1 = Scaling()


class Scaling(nn.LayerNorm):
    def __init__(self) -> None:
        super().__init__(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Twice.apply(x))


def plain() -> nn.Module:
    return Network()
