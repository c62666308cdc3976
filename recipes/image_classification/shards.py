"""ImageShards: images to classify, in tar or Parquet shards at any path or URL."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_dtype

from lightning_dist.data import ShardCache, ShardDataset, ShardSampler
from recipes.parts import PartsData


class ImageShards(PartsData):
    """Images and labels of shards that ``lightning-dist data index`` has indexed, resized to squares. Transparency is
    left aside.

    Args:
        train: index of the training shards, or several for a mixture.
        val, test: an index each.
        num_classes: number of classes; labels count from 0.
        image, label: the extension of members of tars, or column of tables, that has the encoded image, and the label.
        image_size: height and width of what the network sees.
        in_channels: 1 for grey, 3 for colours; here also so that the model's config can refer to it.
        min_area: least share of an image's area that a training crop has, which is also mirrored at random; None trains
            on what is evaluated.
        mean, std: of all channels, or of each: subtracted, and divided by.
        weights: of each training index; by default every image comes once.
        window: images that are shuffled with each other.
        num_canonical_ranks: see :class:`lightning_dist.data.ShardSampler`.
        cache, cache_bytes: directory and bound of :class:`lightning_dist.data.ShardCache`.
        batch_size: samples per process and step.
        num_workers: processes that read and decode ahead.
        eval_batch_size: samples per process and batch of evaluation.
    """

    def __init__(
        self,
        train: str | Path | Sequence[str | Path],
        val: str | Path,
        test: str | Path,
        num_classes: int,
        image: str = "jpg",
        label: str = "cls",
        image_size: int = 224,
        in_channels: int = 3,
        min_area: float | None = 0.35,
        mean: float | Sequence[float] = (0.485, 0.456, 0.406),
        std: float | Sequence[float] = (0.229, 0.224, 0.225),
        weights: Sequence[float] | None = None,
        window: int = 1 << 14,
        num_canonical_ranks: int = 1,
        cache: str | Path | None = None,
        cache_bytes: float = 64e9,
        batch_size: int = 64,
        num_workers: int = 4,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, eval_batch_size)
        self._places = {"train": train if isinstance(train, str | Path) else list(train), "val": val, "test": test}
        self.num_classes, self.weights = num_classes, weights
        self._order: dict[str, Any] = {"window": window, "num_canonical_ranks": num_canonical_ranks}
        self._image, self._label, self._cache = image, label, ShardCache(cache, cache_bytes)
        crop: list[Any] = [v2.Resize(math.ceil(image_size / 0.875)), v2.CenterCrop(image_size)]
        vary: list[Any] = [v2.RandomHorizontalFlip()]
        if min_area is not None:
            vary.insert(0, v2.RandomResizedCrop(image_size, scale=(min_area, 1.0)))
        per_channel = [[x] * in_channels if isinstance(x, float | int) else list(x) for x in (mean, std)]
        colours: list[Any] = [_opaque, _resizable, v2.RGB() if in_channels == 3 else v2.Grayscale()]
        last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*per_channel)]
        self._transforms = {
            "train": v2.Compose([*colours, *(crop if min_area is None else vary), *last]),
            "val": v2.Compose([*colours, *crop, *last]),
        }

    def setup(self, stage: str) -> None:
        """Reads the indexes of the parts that the stage needs; no shard is opened."""
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        for part in needed[stage]:
            if part not in self.parts:
                images = self._transforms["train" if part == "train" else "val"]
                labelled = Labelled(self._image, self._label, self.num_classes, images)
                self.parts[part] = ShardDataset(
                    self._places[part], transform=labelled, decoders={self._image: "png"}, cache=self._cache
                )

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches; an incomplete last one is dropped."""
        data = self.parts["train"]
        assert isinstance(data, ShardDataset)
        sampler = ShardSampler(data, weights=self.weights, **self._order)
        return self._loader("train", self.batch_size, sampler=sampler, drop_last=True)


def _opaque(image: Tensor) -> Tensor:
    """The colours alone of what has transparency, as Pillow's ``convert("RGB")``, by which image folders are read."""
    return image[:3] if len(image) == 4 else image


def _resizable(image: Tensor) -> Tensor:
    """What is not of 8 bits in [0, 1], since torch has few operations on integers of 16."""
    return image if image.dtype == torch.uint8 else to_dtype(image, torch.float32, scale=True)


class Labelled:
    """A decoded sample as ``(image, label)``: ``(channels, height, width)`` float, and int64.

    Args:
        image, label: their names in the sample.
        num_classes: above every label.
        transform: of images ``(channels, height, width)``, uint8 or uint16.
    """

    def __init__(self, image: str, label: str, num_classes: int, transform: Callable[[Tensor], Tensor]) -> None:
        self.image, self.label, self.num_classes, self.transform = image, label, num_classes, transform

    def __call__(self, sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Of one sample; a ValueError where it lacks a part, or its label is of no class."""
        if lacking := [name for name in (self.image, self.label) if name not in sample]:
            raise ValueError(
                f"a sample has no {lacking[0]!r}; it has {', '.join(map(repr, sample))}; pass data.image= and "
                "data.label="
            )
        label = int(sample[self.label])
        if not 0 <= label < self.num_classes:
            raise ValueError(f"a sample has label {label} and data.num_classes={self.num_classes}; pass what there are")
        return self.transform(sample[self.image]), torch.tensor(label)
