"""Networks over the columns of a table."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class ColumnTokens(nn.Module):
    """A token for each column, of a number by a line through its value, of a category by its embedding.

    Args:
        num_numeric: columns of numbers.
        num_categories: of all columns together.
        width: features of a token.
    """

    def __init__(self, num_numeric: int, num_categories: int, width: int) -> None:
        super().__init__()
        self.weight, self.bias, self.missing = (nn.Parameter(torch.empty(num_numeric, width)) for _ in range(3))
        self.categories = nn.Embedding(num_categories, width)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=width**-0.5)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """From ``(batch, num_numeric)``, NaN where one is missing, and ``(batch, num_categorical)`` to tokens ``(batch,
        columns, width)``.
        """
        lines = numbers.nan_to_num(0.0)[..., None] * self.weight + self.bias
        lines = torch.where(numbers.isnan()[..., None], self.missing, lines)
        return torch.cat([lines, self.categories(categories)], dim=1)


class ColumnTransformer(nn.Module):
    """Attention among the columns of a row, as in https://arxiv.org/abs/2106.11959, with mean pooling.

    Args:
        num_numeric: columns of numbers.
        num_categorical: columns of categories; any number of them will do here.
        num_categories: of all columns together.
        width: features of a token; ``num_heads`` divides it.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the feed-forward layer over ``width``.
        dropout: of the feed-forward and projection layers.
    """

    def __init__(
        self,
        num_numeric: int,
        num_categorical: int,
        num_categories: int,
        *,
        width: int = 32,
        depth: int = 2,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.tokens = ColumnTokens(num_numeric, num_categories, width)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio, qkv_bias=True, proj_drop=dropout) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """Logits ``(batch,)`` of the positive class."""
        x = self.tokens(numbers, categories)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean(dim=1))).squeeze(-1)


class ColumnMLP(nn.Module):
    """Residual feed-forward blocks over all columns side by side.

    Args:
        num_numeric: columns of numbers.
        num_categorical: columns of categories.
        num_categories: of all columns together.
        token_width: features of a column.
        width: features of a row.
        depth: number of blocks.
        dropout: in the blocks.
    """

    def __init__(
        self,
        num_numeric: int,
        num_categorical: int,
        num_categories: int,
        *,
        token_width: int = 8,
        width: int = 64,
        depth: int = 2,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.tokens = ColumnTokens(num_numeric, num_categories, token_width)
        self.stem = nn.Linear((num_numeric + num_categorical) * token_width, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, width)
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """Logits ``(batch,)`` of the positive class."""
        x = self.stem(self.tokens(numbers, categories).flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x)).squeeze(-1)
