"""A training loop as a user of Fabric writes it, run under a layout and by plain Fabric in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dist import HybridFabricStrategy, Layout
from tests.support.device import device_type
from tests.support.models import CLASSES, WIDTH, samples
from tests.support.parity import Record, whole_weights

TOLERANCE = 2e-5
"""Relative, of float32 rounding over tens of steps."""

LAYOUTS = [("dp_replicate=2", 2), ("dp_shard=2", 2), ("tp=2", 2), ("dp_shard=2,tp=2", 4)]


class Net(nn.Module):
    """A small transformer over the numbers of a sample, four at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        layer = partial(nn.TransformerEncoderLayer, WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.blocks = nn.ModuleList(layer() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x.view(len(x), -1, 4))
        for block in self.blocks:
            x = block(x)
        return self.norm(x.mean(1))


class Tied(Net):
    """One weight in the first and the last layer, and a block that does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(torch.randn(CLASSES, WIDTH) / 4)
        self.stem = nn.Linear(WIDTH, CLASSES, bias=False)
        self.stem.weight = self.head.weight
        for parameter in self.blocks[1].parameters():
            parameter.requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        x = x.view(len(x), -1, 4) @ self.stem.weight
        for block in self.blocks:
            x = block(x)
        return self.norm(x.mean(1))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    # the gradient of a key's bias is zero but for rounding, which a small eps would make steps of
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, eps=1e-4)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 3e-2, momentum=0.9)


@dataclass
class Loop:
    """What is trained, and how.

    Args:
        model: makes it; at the top of a file, so that ranks can import it.
        optimizer: makes it of a model.
        after: the optimizer is made after the model was set up; else they are set up together.
        clip: arguments of ``clip_gradients``.
        accumulate: micro-steps for each step.
        count: samples; 60 leave a last batch of 4 of 8.
        schedules: the learning rate falls from step to step.
        shuffle: by a generator of the loader.
        precision: its name, or a plugin.
        epochs: that it is trained for.
    """

    model: Callable[[], nn.Module] = Net
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw
    after: bool = False
    clip: dict[str, float] | None = None
    accumulate: int = 1
    count: int = 60
    batch_size: int = 8
    schedules: bool = False
    shuffle: bool = False
    precision: Any = "32-true"
    epochs: int = 2


def fabric_for(layout: str | None, precision: Any = "32-true", **options: Any) -> Fabric:
    """Plain Fabric in one process for None, else under a layout on the ranks that are there."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    strategy: Any = "auto" if layout is None else HybridFabricStrategy(layout, **options)
    kind: dict[str, Any] = {"precision": precision} if isinstance(precision, str) else {"plugins": precision}
    fabric = Fabric(accelerator=device_type(), devices=world, strategy=strategy, **kind)
    fabric.launch()
    return fabric


class Training:
    """Of one loop: what it made, set up; runs epochs."""

    def __init__(self, loop: Loop, layout: str | None, **options: Any) -> None:
        self.loop = loop
        self.fabric = fabric = fabric_for(layout, loop.precision, **options)
        fabric.seed_everything(1, verbose=False)
        model = loop.model()
        if loop.after:
            self.model = fabric.setup_module(model)
            self.optimizer = fabric.setup_optimizers(loop.optimizer(self.model))
        else:
            self.model, self.optimizer = fabric.setup(model, loop.optimizer(model))
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.8 if loop.schedules else 1.0)
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        ranks = 1 if layout is None else Layout.parse(layout).resolve(world).num_data_ranks
        loader = DataLoader(
            samples(loop.count),
            batch_size=loop.batch_size // ranks,
            shuffle=loop.shuffle,
            generator=torch.Generator().manual_seed(7) if loop.shuffle else None,
        )
        self.loader = fabric.setup_dataloaders(loader)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def epoch(self) -> None:
        loop, fabric = self.loop, self.fabric
        self.model.train()
        for index, (x, y) in enumerate(self.loader):
            steps = (index + 1) % loop.accumulate == 0
            with fabric.no_backward_sync(self.model, enabled=not steps):
                loss = F.cross_entropy(self.model(x), y)
                fabric.backward(loss / loop.accumulate)
            self.losses.append(float(fabric.all_reduce(loss.detach().clone())))
            if not steps:
                continue
            norm = fabric.clip_gradients(self.model, self.optimizer, max_norm=1e9)
            self.norms.append(float(norm))
            if loop.clip:
                fabric.clip_gradients(self.model, self.optimizer, **loop.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    @property
    def state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "losses": list(self.losses),
            "mean": torch.tensor(self.losses).mean(),
        }

    def record(self) -> Record:
        return Record(self.losses, self.norms, {}, whole_weights(self.model.module))


def train(loop: Loop, layout: str | None) -> Record:
    """Trains."""
    training = Training(loop, layout)
    for _ in range(loop.epochs):
        training.epoch()
    return training.record()


def save(loop: Loop, layout: str | None, path: Path, **options: Any) -> None:
    """Trains for an epoch, and saves."""
    training = Training(loop, layout, **options)
    training.epoch()
    training.fabric.save(path, training.state)


def go_on(loop: Loop, layout: str | None, path: Path) -> tuple[Record, dict[str, Any], Tensor]:
    """Loads, and trains for another epoch; what came back of the file beside what was asked for."""
    training = Training(loop, layout)
    state = training.state
    del state["mean"]
    rest = training.fabric.load(path, state)
    training.losses = state["losses"]
    training.epoch()
    return training.record(), {key: type(value) for key, value in rest.items()}, rest["mean"]
