"""A network that drives by both sensors."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from recipes.driving.highway import ACTIONS, GRID_FEATURES, VEHICLE_FEATURES, Highway


class SensorTokens(nn.Module):
    """Tokens of both sensors: patches of the grid, from convolutions, and vehicles, from a line through their features.

    Args:
        width: features of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.grid = nn.Sequential(
            nn.Conv2d(len(GRID_FEATURES), width // 2, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=(2, 1), padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, (5, 3), stride=(4, 2), padding=(2, 1)),
        )
        self.vehicles = nn.Linear(len(VEHICLE_FEATURES), width)
        self.ego = nn.Parameter(torch.zeros(width))
        """Tells the driver's own vehicle from the others."""

    def forward(self, grid: Tensor, vehicles: Tensor) -> Tensor:
        """From ``(batch, 4, length, width)`` and ``(batch, num_seen, 5)`` to tokens ``(batch, count, features)``."""
        seen = self.vehicles(vehicles)
        ego, others = seen[:, :1] + self.ego, seen[:, 1:]
        return torch.cat([ego, others, self.grid(grid).flatten(2).transpose(1, 2)], dim=1)


class SensorTransformer(nn.Module):
    """Attention among vehicles and patches of the grid; the driver's own vehicle tells the action.

    Args:
        highway: on which it drives, which tells what it sees.
        width: features of a token; ``num_heads`` divides it.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the feed-forward layer over ``width``.
        dropout: of the feed-forward and projection layers.
    """

    def __init__(
        self,
        highway: Highway,
        *,
        width: int = 64,
        depth: int = 3,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens = SensorTokens(width)
        length, side = highway.grid_shape
        num_patches = -(-length // 8) * -(-side // 2)
        self.positions = nn.Parameter(torch.empty(highway.num_seen + num_patches, width))
        nn.init.normal_(self.positions, std=width**-0.5)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio, qkv_bias=True, proj_drop=dropout) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(ACTIONS))

    def forward(self, grid: Tensor, vehicles: Tensor) -> Tensor:
        """Logits ``(batch, num_actions)`` of what :class:`~recipes.driving.highway.Observation` has."""
        x = self.tokens(grid, vehicles) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))
