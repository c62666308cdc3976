"""What is trained: the recipes' modules in sizes that one core can step through in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from recipes.image_classification.models import torchvision_classifier, vision_transformer
from recipes.image_classification.module import ImageClassifier
from recipes.language_model.decoder import Decoder
from recipes.language_model.module import CausalLM

NUM_CLASSES = 10
NUM_DIFFERENT = 64
"""Samples that differ; a data set repeats them."""


@dataclass(frozen=True)
class Workload:
    """A LightningModule and what it reads.

    Args:
        recipe: makes the module.
        sample: makes one sample.
        loss: of the network and a batch; what the module's training step computes, for a loop written by hand.
        batch_size: samples per rank and step.
    """

    recipe: Callable[..., pl.LightningModule]
    network: Callable[[], nn.Module]
    sample: Callable[[], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    batch_size: int

    def module(self, kind: type[pl.LightningModule] | None = None) -> Any:
        """The module; every rank and competitor makes it with the same weights.

        Args:
            kind: a subclass of the recipe's class to make instead.
        """
        torch.manual_seed(0)
        optimizer = partial(torch.optim.AdamW, lr=1e-3)
        return self.recipe(self.network, optimizer) if kind is None else self._of(kind)(self.network, optimizer)

    def _of(self, kind: type[pl.LightningModule]) -> Callable[..., pl.LightningModule]:
        if isinstance(self.recipe, partial):
            return partial(kind, **self.recipe.keywords)
        return kind

    @property
    def recipe_class(self) -> type[pl.LightningModule]:
        """Class of the module."""
        return self.recipe.func if isinstance(self.recipe, partial) else self.recipe  # type: ignore[return-value]

    def loader(self, num_batches: int) -> DataLoader:
        """An ordinary loader of so many batches, as one process would read them."""
        torch.manual_seed(1)
        return DataLoader(
            _Repeated([self.sample() for _ in range(NUM_DIFFERENT)], num_batches * self.batch_size),
            batch_size=self.batch_size,
        )


class _Repeated(Dataset):
    def __init__(self, samples: list[Any], length: int) -> None:
        self.samples, self.length = samples, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.samples[index % len(self.samples)]


def _image_loss(network: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(network(batch[0]), batch[1])


def _text_loss(network: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(network(batch["inputs"]).flatten(0, 1), batch["targets"].flatten())


def _images(network: Callable[..., nn.Module], size: int, channels: int, batch_size: int, **arguments: Any) -> Workload:
    return Workload(
        recipe=partial(ImageClassifier, num_classes=NUM_CLASSES),
        network=partial(network, image_size=size, in_channels=channels, num_classes=NUM_CLASSES, **arguments),
        sample=lambda: (torch.randn(channels, size, size), int(torch.randint(NUM_CLASSES, ()))),
        loss=_image_loss,
        batch_size=batch_size,
    )


def _text(vocab_size: int, length: int, batch_size: int, **arguments: Any) -> Workload:
    def sample() -> dict[str, Tensor]:
        tokens = torch.randint(vocab_size, (length + 1,))
        return {"inputs": tokens[:-1], "targets": tokens[1:]}

    return Workload(
        recipe=CausalLM,
        network=partial(Decoder, vocab_size, **arguments),
        sample=sample,
        loss=_text_loss,
        batch_size=batch_size,
    )


WORKLOADS: dict[str, Workload] = {
    "vit_tiny": _images(vision_transformer, 8, 1, batch_size=32),
    "vit": _images(vision_transformer, 32, 3, batch_size=4, patch_size=4, width=192, depth=6, num_heads=3),
    "resnet18": _images(partial(torchvision_classifier, "resnet18"), 32, 3, batch_size=8),
    "decoder_tiny": _text(256, 64, batch_size=8, width=64, depth=2),
    "decoder": _text(2048, 128, batch_size=2, width=256, depth=4),
}
"""By name. The tiny ones are those of the first recipes, where a step is mostly overhead."""
