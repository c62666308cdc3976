"""Whole tasks in small: generation, segmentation, detection, sequences, meta-learning."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader

from tests.user_code.case import Case, evaluated
from tests.user_code.networks import Block, Classifier, Layer, Mlp, Net, TransformerClassifier
from tests.user_code.samples import CLASSES, FEATURES, images, noisy_loader, points


class Vae(L.LightningModule):
    """Its noise comes with the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Net(2 * FEATURES), Net(FEATURES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _, noise = batch
        mean, log_variance = self.encoder(x).chunk(2, 1)
        divergence = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum(1).mean()
        loss = F.mse_loss(self.decoder(mean + noise * (log_variance / 2).exp()), x) + 0.1 * divergence
        self.log_dict({"loss": loss, "divergence": divergence})
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


class UNet(nn.Module):
    """One level down and up, with attention over positions at the bottom."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.pool = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 2, stride=2)
        self.bottom = nn.ModuleList(Layer() for _ in range(2))
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x).relu()
        low = self.pool(high)
        tokens = low.flatten(2).transpose(1, 2)
        for layer in self.bottom:
            tokens = layer(tokens)
        low = tokens.transpose(1, 2).reshape(low.shape)
        return self.out(torch.cat([self.up(low), high], 1))


class Segmentation(Classifier):
    """Dice of each image, and cross-entropy."""

    def build(self) -> nn.Module:
        return UNet()

    def loss(self, batch: Any) -> Tensor:
        logits, mask = self(batch[0]), batch[1]
        p = logits.sigmoid()
        dice = 1 - 2 * (p * mask).sum((1, 2, 3)) / (p.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)
        return dice.mean() + F.binary_cross_entropy_with_logits(logits, mask)


class Detector(nn.Module):
    """A class and a box for each of four places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, FEATURES)
        self.blocks = nn.ModuleList(Layer() for _ in range(2))
        self.classes, self.boxes = nn.Linear(FEATURES, 3), nn.Linear(FEATURES, 4)

    def forward(self, x: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        places = self.stem(x.reshape(len(x), 4, 2))
        for block in self.blocks:
            places = block(places)
        labels, boxes = (torch.stack([target[key] for target in targets]) for key in ("labels", "boxes"))
        there = (labels > 0)[..., None]
        return {
            "classes": F.cross_entropy(self.classes(places).transpose(1, 2), labels),
            "boxes": (F.smooth_l1_loss(self.boxes(places), boxes, reduction="none") * there).sum((1, 2)).mean(),
        }


class Detection(Classifier):
    """The network gives a dictionary of losses, as torchvision's do; targets are a list of dictionaries."""

    def build(self) -> nn.Module:
        return Detector()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.net(*batch)
        self.log_dict(losses)
        return sum(losses.values())  # type: ignore[return-value]


def scenes(size: int) -> DataLoader:
    """Samples with a dictionary of targets each, collated into a list."""
    x, y = points()
    targets = [{"labels": (y[i] + torch.arange(4)) % 3, "boxes": x[i].repeat(2).reshape(4, 4)} for i in range(len(x))]
    together = lambda batch: (torch.stack([x for x, _ in batch]), [target for _, target in batch])  # noqa: E731
    return DataLoader(list(zip(x, targets, strict=True)), batch_size=size, collate_fn=together)  # type: ignore


class Recurrent(nn.Module):
    """A packed LSTM of sequences of several lengths, before blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, FEATURES, batch_first=True)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        last = hidden[torch.arange(len(x)), lengths - 1]
        for block in self.blocks:
            last = block(last)
        return self.head(last)


class Sequences(Classifier):
    def build(self) -> nn.Module:
        return Recurrent()

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0], batch[1]), batch[2])


def sequences(size: int) -> DataLoader:
    """Of lengths 1 to 4, padded to the longest of the batch."""
    x, y = points()

    def together(batch: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        cut = [x[i].reshape(4, 2)[: 1 + i % 4] for i in batch]
        return pad_sequence(cut, batch_first=True), torch.tensor([len(c) for c in cut]), y[batch]

    return DataLoader(range(32), batch_size=size, collate_fn=together)  # type: ignore[arg-type]


class Meta(Classifier):
    """MAML: a step on one half of a sample's view inside of the loss, through functional_call."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        weights = dict(self.net.named_parameters())
        inner = F.cross_entropy(functional_call(self.net, weights, (x,)), y)
        names = ["head.weight", "head.bias"]
        slopes = torch.autograd.grad(inner, [weights[name] for name in names], create_graph=True)
        adapted = {name: weights[name] - 0.1 * slope for name, slope in zip(names, slopes, strict=True)}
        return F.cross_entropy(functional_call(self.net, {**weights, **adapted}, (x + 0.1,)), y)


class Quantised(Classifier):
    """VQ-VAE: the nearest of a codebook, which is a buffer that forward moves."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Net(FEATURES, inputs=CLASSES)
        self.register_buffer("codes", torch.randn(6, CLASSES))

    def loss(self, batch: Any) -> Tensor:
        z = self.net(batch[0])
        nearest = torch.cdist(z.detach(), self.codes).argmin(1)
        code = self.codes[nearest]
        if self.training:
            chosen = F.one_hot(nearest, len(self.codes)).to(z.dtype)
            sums, counts = chosen.T @ z.detach(), chosen.sum(0)[:, None]
            self.codes = torch.where(counts > 0, 0.9 * self.codes + 0.1 * sums / counts.clamp(min=1), self.codes)
        return F.mse_loss(self.decoder(z + (code - z).detach()), batch[0]) + 0.25 * F.mse_loss(z, code)


class Normalising(Classifier):
    """BatchNorm between the blocks."""

    def build(self) -> nn.Module:
        blocks = nn.Sequential(*(Block() for _ in range(2)))
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), blocks, nn.BatchNorm1d(8), nn.Linear(8, CLASSES))


class Weighted(TransformerClassifier):
    """Several tasks, weighted by uncertainties that are learned; label smoothing and mixup."""

    def __init__(self) -> None:
        super().__init__()
        self.uncertainty = nn.Parameter(torch.zeros(2))
        self.second = Mlp()

    def loss(self, batch: Any) -> Tensor:
        x, y, noise = batch
        first = F.cross_entropy(self(0.8 * x + 0.2 * noise), y, label_smoothing=0.1)
        tasks = torch.stack([first, F.mse_loss(self.second(x), noise)])
        return (tasks * (-self.uncertainty).exp() + self.uncertainty).sum()


class Pinn(Classifier):
    """A differential equation in the loss: second derivatives by the inputs."""

    def loss(self, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        u = self(x).sum(1)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)
        return 0.01 * (bend[:, 0] + u - x[:, 1]).pow(2).mean()


CASES = [
    Case("transformer", TransformerClassifier, val=evaluated, trainer={"gradient_clip_val": 0.5}),
    Case("vae", Vae, noisy_loader),
    Case("unet_dice", Segmentation, images),
    Case("detection", Detection, scenes),
    Case("packed_lstm", Sequences, sequences),
    Case("maml", Meta, like="ddp", note="as ddp: the inner step is of the rank's own samples"),
    Case("vq_vae", Quantised, like="ddp", left_out="final codes", note="as ddp: codes are those of rank 0"),
    Case("batch_norm", Normalising, like="ddp", left_out="running|num_batches", note="as ddp: own samples' statistics"),
    Case("multi_task", Weighted, noisy_loader),
    Case("physics_informed", Pinn),
]
