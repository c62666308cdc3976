"""A small network of blocks, and how networks are divided without a strategy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_dist.parallel.tensor.split import TensorAxis, split
from lightning_dist.patches import Patches
from lightning_dist.plans import find_blocks
from lightning_dist.plans.tensor import TensorOptions, partial_parameters

WIDTH, POSITIONS = 16, 7


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class Conditioned(nn.Module):
    """A block of a diffusion transformer: its norm is scaled by what a condition says."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.mlp = Mlp()
        self.drop = nn.Dropout(dropout)
        self.drop_path = timm.layers.DropPath(dropout)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, -1)
        return x + self.drop_path(self.drop(self.mlp(self.norm(x) * (1 + scale) + shift)))


class Network(nn.Module):
    """``between`` is what it does between its blocks."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem, self.embed = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Conditioned(dropout) for _ in range(2))
        self.between = between
        self.last = 2

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x, condition = self.stem(x), self.embed(condition)
        for block in self.blocks[: self.last]:
            x = self.between(block(x, condition))
        return x


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(3, POSITIONS, WIDTH), torch.randn(3, WIDTH)


def divided_copy(
    plain: nn.Module, sequence_parallel: bool = False, loss_parallel: bool = False
) -> tuple[Any, TensorAxis]:
    network = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))
    sharding_plan = TensorOptions(None, sequence_parallel, loss_parallel).sharding_plan(
        network, mesh.size(), find_blocks(network)
    )
    assert sharding_plan is not None
    split(network, sharding_plan, mesh, patches=Patches())
    return network, TensorAxis(network, partial_parameters(network, sharding_plan), mesh)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
