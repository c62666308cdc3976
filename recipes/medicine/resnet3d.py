"""A small residual network over volumes."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ResNet3D(nn.Module):
    """Basic blocks (https://arxiv.org/abs/1512.03385) of 3 x 3 x 3 convolutions, with group normalisation, which does
    not depend on the other samples of a batch.

    Args:
        in_channels: of a volume.
        num_classes: number of classes.
        widths: channels of each stage; each but the first halves depth, height and width.
        blocks: of a stage.
        groups: of the normalisation; divides all widths.
        dropout: before the last layer.

    Raises:
        ValueError: a width that ``groups`` does not divide.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        widths: Sequence[int] = (16, 32, 64, 128),
        blocks: int = 1,
        groups: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if uneven := [width for width in widths if width % groups]:
            raise ValueError(f"groups={groups} does not divide a width of {uneven[0]}; pass a divisor of all widths")
        self.stem = nn.Sequential(
            nn.Conv3d(in_channels, widths[0], 3, padding=1, bias=False), nn.GroupNorm(groups, widths[0]), nn.ReLU()
        )
        self.blocks = nn.ModuleList()
        before = widths[0]
        for stage, width in enumerate(widths):
            for index in range(blocks):
                self.blocks.append(Block(before, width, 2 if stage > 0 and index == 0 else 1, groups))
                before = width
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, volumes: Tensor) -> Tensor:
        """From ``(batch, channels, depth, height, width)`` to logits ``(batch, num_classes)``.

        Raises:
            ValueError: scans of two dims.
        """
        if volumes.ndim != 5:
            raise ValueError(
                f"model=resnet3d is for volumes (batch, channels, depth, height, width), and these scans are "
                f"{tuple(volumes.shape)}; pass model=resnet18 for images"
            )
        x = self.stem(volumes)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x.mean(dim=(2, 3, 4))))


class Block(nn.Module):
    """Two convolutions, added to what they were given.

    Args:
        width: channels given.
        out: channels that come of it.
        stride: of the first convolution.
        groups: of the normalisation.
    """

    def __init__(self, width: int, out: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv3d(width, out, 3, stride, 1, bias=False), nn.GroupNorm(groups, out)
        self.conv2, self.norm2 = nn.Conv3d(out, out, 3, 1, 1, bias=False), nn.GroupNorm(groups, out)
        changes = stride > 1 or width != out
        self.shortcut = nn.Conv3d(width, out, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """To ``out`` channels, in each dim divided by the stride."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))
