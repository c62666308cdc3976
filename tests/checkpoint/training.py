"""A small module with everything a checkpoint has to cope with, trained under a layout."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from lightning_dist import checkpoint
from lightning_dist.pytree import map_leaves

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "adamw-tensor-lr": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(1e-2)),
    "adamw-fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2),
}

MESHES = {"one": None, "replicate": None, "shard": 1, "hybrid": 2}
RANKS = {"one": 1, "replicate": 2, "shard": 2, "hybrid": 4}


class Net(L.LightningModule):
    """Sizes that do not divide by 2, a tied, a frozen, an unused and a one-element parameter, and buffers."""

    def __init__(self, width: int = 7, optimizer: str = "adamw") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, width, bias=False)  # a bias before the norm would train on rounding
        self.norm = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.losses: list[float] = []

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.hidden(self.embed(tokens))).relu()
        return self.head(self.frozen(self.out(hidden)) * self.scale)

    def loss(self, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(batch[:, 0]), batch[:, 1])

    def training_step(self, batch: Tensor) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self, self.hparams["optimizer"])
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def make_optimizer(module: nn.Module, name: str) -> Optimizer:
    """Two groups, the frozen parameter left out, the unused ones in."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim == 1]
    return OPTIMIZERS[name]([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}])


def build(layout: str, seed: int = 0, **arguments: Any) -> Net:
    torch.manual_seed(seed)
    module = Net(**arguments)
    if MESHES[layout] is not None:
        world = dist.get_world_size()
        shape, names = ((world,), ("s",)) if MESHES[layout] == 1 else ((2, world // 2), ("r", "s"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        fully_shard(module.hidden, mesh=mesh)
        fully_shard(module, mesh=mesh)
    return module


def batch(step: int) -> Tensor:
    """The same for every rank, so that every layout averages the gradient of one process."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(11, (16, 2), generator=generator)


def train(module: Net, optimizer: Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = module(batch(step)[:, 0])
        loss = nn.functional.cross_entropy(loss, batch(step)[:, 1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def snapshot(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What the strategy hands to :func:`checkpoint.save`, with something of a callback's."""
    return {
        "epoch": 1,
        "state_dict": checkpoint.model_state(module),
        "optimizer_states": [checkpoint.optimizer_state_by_name(optimizer, checkpoint.parameter_names(module))],
        "callbacks": {"Score": {"best": torch.tensor(0.5)}},
    }


def restore(path: Path | str, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    state = checkpoint.load(path, module)
    checkpoint.load_model_state(module, state["state_dict"], source=path)
    checkpoint.load_optimizer_state(optimizer, state["optimizer_states"][0], checkpoint.parameter_names(module), path)
    return state


def leg(
    layout: str, optimizer_name: str, steps: range, start: Path | None, end: Path | None, sharded: bool
) -> list[float]:
    """Part of a run: from one checkpoint to the next, under one layout. Another seed shows what was not loaded."""
    module = build(layout, seed=0 if start is None else 1)
    optimizer = make_optimizer(module, optimizer_name)
    if start is not None:
        restore(start, module, optimizer)
    losses = train(module, optimizer, steps)
    if end is not None:
        checkpoint.save(snapshot(module, optimizer), end, sharded=sharded)
    return losses


def damage(path: Path) -> None:
    """Flips a bit of the largest record of a single file, or in the middle of another."""
    content = bytearray(path.read_bytes())
    at = len(content) // 2
    if zipfile.is_zipfile(path) and path.suffix == ".ckpt":
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda record: record.file_size)
            at = content.index(archive.read(largest)) + largest.file_size // 2
    content[at] ^= 1
    path.write_bytes(content)


def assert_same(first: Any, second: Any, atol: float = 0.0) -> None:
    """Equal trees: the same keys in the same order, the same types, tensors within ``atol``."""
    ours, theirs = _flat(first), _flat(second)
    assert list(ours) == list(theirs)
    for path, value in ours.items():
        other = theirs[path]
        assert type(value) is type(other), path
        if isinstance(value, Tensor):
            assert value.dtype == other.dtype, path
            torch.testing.assert_close(value, other, rtol=0, atol=atol, msg=str(path))
        else:
            assert value == other, path


def _flat(tree: Any) -> dict[Any, Any]:
    leaves: dict[Any, Any] = {}
    map_leaves(tree, lambda path, value: leaves.setdefault(path, value))
    return leaves
