"""Losses over pairs of samples, of this rank or of all."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from tests.user_code.case import Case
from tests.user_code.networks import Net, Transformer
from tests.user_code.samples import FEATURES, noisy_loader


class SimClr(L.LightningModule):
    """Two views of a sample against the views of this rank's other samples."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Net(FEATURES)

    def views(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, _, noise = batch
        return F.normalize(self.encoder(x), dim=1), F.normalize(self.encoder(x + 0.1 * noise), dim=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nt_xent(*self.views(batch))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def nt_xent(first: Tensor, second: Tensor) -> Tensor:
    """SimCLR's loss."""
    z = torch.cat([first, second])
    likeness = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(likeness, torch.arange(len(z)).roll(len(first)))


class SimClrGathered(SimClr):
    """Against those of all ranks, as Lightning's documentation shows it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = (self.all_gather(z, sync_grads=True).reshape(-1, FEATURES) for z in self.views(batch))
        loss = nt_xent(first, second)
        self.log("loss", loss)
        return loss


class Clip(L.LightningModule):
    """Two towers, a learned temperature, and the pairs of all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.texts = Transformer(FEATURES), Net(FEATURES)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _, noise = batch
        pair = torch.stack([F.normalize(self.images(x), dim=1), F.normalize(self.texts(x + noise), dim=1)], 1)
        images, texts = self.all_gather(pair, sync_grads=True).reshape(-1, 2, FEATURES).unbind(1)
        logits = self.scale.exp() * images @ texts.T
        labels = torch.arange(len(logits))
        self.log("temperature", self.scale.detach())
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class BarlowTwins(SimClr):
    """The correlation of features over the samples of all ranks."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = (self.all_gather(z, sync_grads=True).reshape(-1, FEATURES) for z in self.views(batch))
        first, second = (z - z.mean(0) for z in (first, second))
        correlation = first.T @ second / len(first)
        return (torch.eye(FEATURES) - correlation).pow(2).sum()


class GatheredOverTheWorld(SimClr):
    """Keys without gradients, gathered by the user's own call over all ranks."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        queries, keys = self.views(batch)
        keys, first = keys.detach(), 0
        if dist.is_initialized():
            everyone = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, keys)
            keys, first = torch.cat(everyone), dist.get_rank() * len(queries)
        return F.cross_entropy(queries @ keys.T / 0.5, torch.arange(first, first + len(queries)))


class Triplet(SimClr):
    """An anchor, a positive and a negative, one encoder three times."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _, noise = batch
        return F.triplet_margin_loss(*(self.encoder(view) for view in (x, x + 0.1 * noise, noise)))


CASES = [
    Case("simclr_gathered", SimClrGathered, noisy_loader),
    Case("simclr_own_samples", SimClr, noisy_loader, like="ddp", note="as ddp: negatives are those of the rank"),
    Case("clip", Clip, noisy_loader),
    Case("barlow_twins", BarlowTwins, noisy_loader),
    Case(
        "all_gather_over_the_world",
        GatheredOverTheWorld,
        noisy_loader,
        refused=dict.fromkeys(("t", "st"), "all_gather"),
        note="ranks of tp have the same samples: twice in what the world gathers",
    ),
    Case("triplet", Triplet, noisy_loader),
]
