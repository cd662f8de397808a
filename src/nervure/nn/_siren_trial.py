"""What the claims on sine networks share: signals with known derivatives, rivals, and a fair way to fit them."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nervure.core import forward
from nervure.spec import Ctx


class Fourier(nn.Module):
    """Give [sin, cos](2 pi B x) with B drawn normal: the strong rival's input features."""

    def __init__(self, scale: float, count: int, generator: torch.Generator) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", scale * torch.randn(2, count, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        phase = 2 * math.pi * x @ self.frequencies
        return torch.cat([phase.sin(), phase.cos()], -1)


def mlp(ctx: Ctx, activation: Callable[[], nn.Module], *, inputs: int = 2, width: int = 64) -> nn.Sequential:
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ctx.seed_for("mlp"))
        for count in (inputs, width, width):
            layers += [nn.Linear(count, width), activation()]
        return nn.Sequential(*layers, nn.Linear(width, 1))


RATES = (3e-4, 1e-3, 3e-3, 1e-2)
Build = Callable[[], nn.Module]


def fit(ctx: Ctx, build: Build, x: Tensor, y: Tensor, *, steps: int, wrap: Any = None) -> tuple[nn.Module, float]:
    """Fit with the rate that is best after a quarter of the steps; return the network and that early error."""
    data: Any = SimpleNamespace(train_x=x, train_y=y)

    def run(rate: float, count: int) -> tuple[nn.Module, float]:
        net = build()
        seen = wrap(net) if wrap else net
        ctx.train(
            seen,
            data,
            steps=count,
            batch_size=len(x),
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=rate),
            loss=F.mse_loss,
        )
        return net, float(F.mse_loss(forward.predict(seen, x, batch=len(x)), y))

    early = {rate: run(rate, steps // 4)[1] for rate in RATES}
    best = min(early, key=early.__getitem__)
    return run(best, steps)[0], early[best]


def grid(side: int) -> Tensor:
    axis = torch.linspace(-1, 1, side)
    return torch.cartesian_prod(axis, axis)


def sample_image(side: int = 64) -> Tensor:
    """Return the grey centre of scikit-learn's picture of a temple.

    Args:
        side: Height and width in pixels, at most 427.

    Returns:
        Shape (side, side), in [-1, 1].
    """
    from sklearn.datasets import load_sample_image

    picture = load_sample_image("china.jpg").astype(np.float32).mean(-1) / 127.5 - 1
    top, left = ((length - side) // 2 for length in picture.shape)
    return torch.from_numpy(picture[top : top + side, left : left + side].copy())


class Waves:
    """A band-limited field of unit variance with known derivatives: twelve plane waves of at most six periods."""

    def __init__(self, generator: torch.Generator) -> None:
        self.k = math.pi * torch.randint(-6, 7, (12, 2), generator=generator).float()
        self.k[(self.k == 0).all(1)] = math.pi
        self.phase = 2 * math.pi * torch.rand(12, generator=generator)

    def __call__(self, x: Tensor) -> Tensor:
        return (x @ self.k.T + self.phase).sin().sum(1, keepdim=True) / math.sqrt(6)
