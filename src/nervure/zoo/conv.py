"""Convolutional models."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max pooling; for 28x28 inputs it has 61,706 parameters.

    Args:
        channels: Input channels.
        size: Height and width of the input.
        classes: Number of outputs.
    """

    def __init__(self, channels: int = 1, size: int = 28, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        side = (size // 2 - 4) // 2
        self.fc1 = nn.Linear(16 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.head = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.head(F.relu(self.fc2(x)))


class DeepConv(nn.Module):
    """Plain deep stack of 3x3 convolutions with in-place ReLU, no skips, no norm.

    Args:
        channels: Input channels.
        width: Channels of every layer.
        depth: Number of convolutions.
        classes: Number of outputs.
    """

    def __init__(self, channels: int = 1, width: int = 8, depth: int = 6, classes: int = 10) -> None:
        super().__init__()
        ends = [channels] + [width] * depth
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(ends))
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for index, conv in enumerate(self.convs):
            x = self.act(conv(x))
            if index == 1:
                x = F.avg_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


class ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm and a skip, projected where the shape changes.

    Args:
        before: Channels in.
        after: Channels out.
        stride: Stride of the first convolution and the projection.
    """

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        changes = stride != 1 or before != after
        self.project = nn.Conv2d(before, after, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.project is None else self.project(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + skip)


class ResidualConv(nn.Module):
    """Small ResNet with BatchNorm.

    Args:
        channels: Input channels.
        widths: Channels of the stages; each but the first halves the resolution.
        classes: Number of outputs.
    """

    def __init__(self, channels: int = 1, widths: tuple[int, ...] = (8, 16), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        ends = (widths[0], *widths)
        self.blocks = nn.ModuleList(
            ResidualBlock(a, b, stride=1 if index == 0 else 2) for index, (a, b) in enumerate(itertools.pairwise(ends))
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class PreActivationNet(nn.Module):
    """Pre-activation ResNet with GroupNorm: the skip path carries raw sums.

    Args:
        channels: Input channels.
        width: Channels of every block.
        blocks: Number of blocks.
        classes: Number of outputs.
    """

    def __init__(self, channels: int = 1, width: int = 8, blocks: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(2, width) for _ in range(2 * blocks))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2 * blocks))
        self.last = nn.GroupNorm(2, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index in range(0, len(self.convs), 2):
            inner = self.convs[index](F.silu(self.norms[index](x)))
            x = x + self.convs[index + 1](F.silu(self.norms[index + 1](inner)))
        return self.head(F.silu(self.last(x)).mean((2, 3)))


class DepthwiseNet(nn.Module):
    """MobileNet-like: depthwise and grouped convolutions, dilation and reflect padding.

    Args:
        channels: Input channels.
        width: Channels after the stem, divisible by 4.
        classes: Number of outputs.
    """

    def __init__(self, channels: int = 1, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, stride=2, padding=1, padding_mode="reflect")
        self.depthwise = nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=width)
        self.pointwise = nn.Conv2d(width, 2 * width, 1)
        self.grouped = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        x = F.hardswish(self.pointwise(self.depthwise(x)))
        x = F.relu6(self.norm(self.grouped(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class UNet(nn.Module):
    """U-Net with concatenated skips and transposed convolution, pooled to class scores.

    Args:
        channels: Input channels.
        width: Channels of the first level.
        classes: Number of outputs.
    """

    def __init__(self, channels: int = 1, width: int = 6, classes: int = 10) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(channels, width, 3, padding=1)
        self.down2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge = nn.Conv2d(2 * width, width, 3, padding=1)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        top = F.relu(self.down1(x))
        low = F.relu(self.down2(F.max_pool2d(top, 2)))
        x = F.relu(self.merge(torch.cat([top, self.up(low)], 1)))
        return self.head(x).mean((2, 3))


class CatChunkNet(nn.Module):
    """Split channels, treat the halves with one shared convolution, and join them again.

    Args:
        channels: Input channels.
        width: Channels, divisible by 2.
        classes: Number of outputs.
    """

    def __init__(self, channels: int = 1, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.branch = nn.Conv2d(width // 2, width // 2, 3, padding=1)
        self.gate = nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        x = torch.cat([F.relu(self.branch(left)), F.relu(self.branch(right))], dim=1)
        return self.head((x * torch.sigmoid(self.gate(x))).mean((2, 3)))
