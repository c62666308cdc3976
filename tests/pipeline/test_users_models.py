"""Models and modules as others ship them: torchvision's detectors, set prediction, the autoencoder of Lightning."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.misc import FrozenBatchNorm2d

from lightning_dist import HybridStrategy
from tests.support.parity import QUIET, once, slow
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

SIZE = 64


def picture(index: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A picture with one to three boxes, their classes and masks."""
    generator = torch.Generator().manual_seed(index)
    count = 1 + index % 3
    corner = torch.randint(0, SIZE // 2, (count, 2), generator=generator)
    extent = torch.randint(10, SIZE // 2, (count, 2), generator=generator)
    boxes = torch.cat([corner, corner + extent], 1)
    masks = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    labels = 1 + torch.randint(0, 2, (count,), generator=generator)
    return torch.rand(3, SIZE, SIZE, generator=generator), {"boxes": boxes.float(), "labels": labels, "masks": masks}


def pictures(size: int) -> DataLoader[Any]:
    """Two batches, each a tuple of pictures and one of targets, as torchvision's references collate them."""
    return DataLoader([picture(i) for i in range(2 * size)], size, collate_fn=lambda batch: tuple(zip(*batch)))  # type: ignore[arg-type, return-value] # noqa: B905


class Recorded(L.LightningModule):
    """Records its losses, and those of a validation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.losses: list[float] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)


class Detector(Recorded):
    """Of torchvision."""

    def __init__(self, kind: type[FasterRCNN]) -> None:
        super().__init__()
        backbone = resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5
        )
        counts = {f"rpn_{when}_nms_top_n_{phase}": 30 for when in ("pre", "post") for phase in ("train", "test")}
        self.model = kind(
            backbone,
            3,
            min_size=SIZE,
            max_size=SIZE,
            rpn_batch_size_per_image=16,
            box_batch_size_per_image=16,
            **counts,
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.model(list(images), [dict(target) for target in targets])
        self.log_dict(losses)
        return sum(losses.values())

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        found = self.model(list(batch[0]))
        self.log("boxes", sum(len(one["boxes"]) for one in found) / len(found))
        return found


class SetPrediction(Recorded):
    """Queries that are matched with boxes, as DETR's."""

    def __init__(self) -> None:
        super().__init__()
        width = 32
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.GELU(), nn.Conv2d(16, width, 2, 2))
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 4, 64, **options), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(width, 4, 64, **options), 2)
        self.queries = nn.Parameter(torch.randn(5, width))
        self.classes, self.boxes = nn.Linear(width, 4), nn.Linear(width, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        h = self.backbone(torch.stack(list(images))).flatten(2).transpose(1, 2)
        h = self.decoder(self.queries.expand(len(images), -1, -1), self.encoder(h))
        logits, boxes = self.classes(h), self.boxes(h).sigmoid()
        losses = [self._matched(*pair) for pair in zip(logits, boxes, targets, strict=True)]
        return torch.stack(losses).mean()

    def _matched(self, logits: Tensor, boxes: Tensor, target: dict[str, Tensor]) -> Tensor:
        wanted = target["boxes"] / SIZE
        cost = torch.cdist(boxes, wanted, p=1) - logits.softmax(-1)[:, target["labels"]]
        rows, columns = linear_sum_assignment(cost.detach().numpy())
        labels = torch.zeros(len(logits), dtype=torch.long)
        labels[rows] = target["labels"][columns]
        return F.cross_entropy(logits, labels) + F.l1_loss(boxes[rows], wanted[columns])


class AutoEncoder(L.LightningModule):
    """That of Lightning's introduction, with outputs that are collected by hand for the end of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(28 * 28, 64), nn.ReLU(), nn.Linear(64, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 28 * 28))
        self.validation_step_outputs: list[Tensor] = []
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        x = x.view(x.size(0), -1)
        loss = F.mse_loss(self.decoder(self.encoder(x)), x)
        self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        codes = self.encoder(batch[0].view(batch[0].size(0), -1))
        self.validation_step_outputs.append(codes)
        return codes

    def on_validation_epoch_end(self) -> None:
        self.losses.append(float(torch.cat(self.validation_step_outputs).std()))
        self.validation_step_outputs.clear()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Digits(L.LightningDataModule):
    """Prepared, split and loaded as the docs' MNISTDataModule."""

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(4)
        images, labels = torch.rand(40, 1, 28, 28, generator=generator), torch.arange(40) % 10
        self.train, self.val = TensorDataset(images[:32], labels[:32]), TensorDataset(images[32:], labels[32:])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=8)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, batch_size=4)


def _fit(name: str, layout: str | None, **options: Any) -> tuple[list[float], dict[str, float]]:
    torch.randperm = lambda n, **_: torch.arange(n)  # what the detectors sample is not what is compared
    module, data = {
        "faster": lambda: (Detector(FasterRCNN), pictures(4)),
        "mask": lambda: (Detector(MaskRCNN), pictures(4)),
        "sets": lambda: (SetPrediction(), pictures(4)),
        "autoencoder": lambda: (AutoEncoder(), Digits()),
    }[name]()
    strategy: Any = "auto" if layout is None else HybridStrategy(layout, **options)
    trainer = L.Trainer(**QUIET, devices=1 if layout is None else 2, max_epochs=1, strategy=strategy)
    validates = name in ("faster", "mask")
    trainer.fit(module, data, pictures(2) if validates else None) if name != "autoencoder" else trainer.fit(
        module, data
    )
    return module.losses, {key: float(value) for key, value in trainer.callback_metrics.items()}


@pytest.fixture(autouse=True)
def _randperm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randperm", torch.randperm)


def _on_pipeline(name: str, options: dict[str, Any]) -> tuple[list[float], dict[str, float]]:
    before = torch.randperm
    try:
        return _fit(name, "pp=2", **options)
    finally:
        torch.randperm = before


@pytest.mark.parametrize(
    ("name", "options"),
    [
        slow("faster", {}),
        # its mask loss is a mean over boxes, not over pictures
        slow("mask", {"num_microbatches": 1}),
        ("sets", {}),
        ("sets", {"pipeline_schedule": "Interleaved1F1B"}),
        ("autoencoder", {}),
    ],
)
def test_as_in_one_process(name: str, options: dict[str, Any]) -> None:
    losses, logged = once(_fit, name, None)
    for got, got_logged in run_on_ranks(2, _on_pipeline, name, options):
        assert got == pytest.approx(losses, rel=1e-5)
        assert got_logged == pytest.approx(logged, rel=1e-5)
