"""The synthetic world, the linear network and the coarse labels of the claims on projection heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nervure.data import Splits
from nervure.spec import Data

NOISE = (0.1, 1.0, 4.0)
"""Variance of the augmentation of each feature, whose own variance is 1."""
WIDTH = 8


def feature_world(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return clean inputs, shape (N, 8), and which of their three features are on, shape (N, 3).

    A feature is an entry of -1 or 1; the other entries are a small noise.
    """
    signs = torch.randint(2, (count, len(NOISE)), generator=draw)
    rest = 0.1 * torch.randn(count, WIDTH - len(NOISE), generator=draw)
    return torch.cat([2.0 * signs - 1, rest], 1), signs


def augmented(x: Tensor, draw: torch.Generator) -> Tensor:
    """Return another view: features under noise of their own strength, and fresh noise in the other entries."""
    scale = torch.tensor([*(variance**0.5 for variance in NOISE), *[1.0] * (WIDTH - len(NOISE))])
    return x + scale * torch.randn(x.shape, generator=draw)


class LinearPair(nn.Module):
    """Two linear layers, balanced and small at first, or with a first layer that is a multiple of an isometry.

    Args:
        gain: That multiple; None for the balanced start.
        draw: Draws the weights.
        width: Units of both layers.
        scale: Size of the small weights.
    """

    def __init__(self, *, gain: float | None, draw: torch.Generator, width: int = 16, scale: float = 0.2) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(WIDTH, width, bias=False), nn.Linear(width, width, bias=False)
        left = torch.linalg.qr(torch.randn(width, width, generator=draw)).Q
        right = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw)).Q
        last = torch.linalg.qr(torch.randn(width, width, generator=draw)).Q
        sizes = scale * (0.5 + torch.rand(WIDTH, generator=draw))
        with torch.no_grad():
            self.encoder.weight.copy_(left[:, :WIDTH] * (sizes if gain is None else gain) @ right)
            self.head.weight.copy_(last[:, :WIDTH] * sizes @ left[:, :WIDTH].T)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features behind the head."""
        found: Tensor = self.head(self.encoder(x))
        return found


def trained(
    net: LinearPair, loss: Callable[[Tensor, Tensor], Tensor], *, steps: int, draw: torch.Generator, lr: float = 0.01
) -> None:
    """Train in place by SGD on 256 fresh pairs a step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for _ in range(steps):
        x, _ = feature_world(256, draw)
        optimizer.zero_grad()
        loss(net(augmented(x, draw)), net(augmented(x, draw))).backward()
        optimizer.step()


def coarse(data: Data) -> Splits:
    """Return the data with the first and the second half of its classes as two."""
    train, held, test = ((y >= data.classes // 2).long() for y in (data.train_y, data.validation_y, data.test_y))
    return Splits(data.name, 2, data.train_x, train, data.validation_x, held, data.test_x, test)
