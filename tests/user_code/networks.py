"""The networks of the cases: repeated blocks, which dp_shard shards, of layers that tp divides."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.user_code.samples import CLASSES, FEATURES


class Mlp(nn.Module):
    """A feed-forward pair."""

    def __init__(self, width: int = FEATURES) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A residual feed-forward block."""

    def __init__(self, width: int = FEATURES) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    """A stem, two blocks, a head."""

    def __init__(self, outputs: int = CLASSES, inputs: int = FEATURES, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, FEATURES)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(FEATURES, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Attention(nn.Module):
    """Self-attention with q, k and v in one matrix."""

    def __init__(self, width: int = FEATURES) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(count, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(count, length, -1))


class Layer(nn.Module):
    """Attention and feed-forward, as in a transformer."""

    def __init__(self, width: int = FEATURES) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Reads a point as four tokens of two features."""

    def __init__(self, outputs: int = CLASSES) -> None:
        super().__init__()
        self.stem = nn.Linear(2, FEATURES)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(FEATURES, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.reshape(len(x), 4, 2))
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Classifier(L.LightningModule):
    """The plain module that most cases change in one place; it logs without ``sync_dist``."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = self.build()

    def build(self) -> nn.Module:
        return Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class TransformerClassifier(Classifier):
    """The same of the network with attention."""

    def build(self) -> nn.Module:
        return Transformer()


class Manual(Classifier):
    """Optimises by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
