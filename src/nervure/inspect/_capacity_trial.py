"""What the claims on capacity train: small networks on random images, digits, and a linear classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn

from nervure.spec import Ctx

Arm = tuple[nn.Module, tuple[Tensor, Tensor], Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None]


def _drawn(net: nn.Module, draw: torch.Generator) -> nn.Module:
    """Draw every weight by torch's own law, from this generator."""
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                bound = layer.weight[0].numel() ** -0.5
                for value in layer.parameters():
                    value.copy_((2 * torch.rand(value.shape, generator=draw) - 1) * bound)
    return net


def mlp(draw: torch.Generator, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Return an MLP 64-24-10 of 1810 parameters."""
    return _drawn(nn.Sequential(nn.Flatten(), nn.Linear(64, 24), activation(), nn.Linear(24, 10)), draw)


def cnn(draw: torch.Generator) -> nn.Module:
    """Return two convolutions and a linear layer, 1954 parameters."""
    layers = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
              nn.Flatten(), nn.Linear(128, 10))  # fmt: skip
    return _drawn(nn.Sequential(*layers), draw)


def arms(ctx: Ctx, data: Any) -> dict[str, Arm]:
    """Return model, samples and optimizer of every arm; those on digits only where they are given."""
    draw = ctx.generator("images")
    x, y = torch.randn(3000, 1, 8, 8, generator=draw), torch.randint(10, (3000,), generator=draw)

    def start() -> torch.Generator:
        return ctx.generator("start")

    found: dict[str, Arm] = {
        "MLP": (mlp(start()), (x, y), None),
        "tanh": (mlp(start(), nn.Tanh), (x, y), None),
        "CNN": (cnn(start()), (x, y), None),
        "full batch": (mlp(start()), (x, y), lambda each: torch.optim.SGD(each, lr=0.3)),
    }
    if data is not None:
        images, labels = data.train_x, data.train_y
        shuffles = [labels[torch.randperm(len(labels), generator=draw)] for _ in range(2)]
        found["true labels"] = (mlp(start()), (images, labels), None)
        found["random labels"] = (mlp(start()), (images, shuffles[0]), None)
        found["random labels again"] = (mlp(start()), (images, shuffles[1]), None)
    return found


def cover(inputs: int) -> float:
    """Return how many random points a linear classifier without bias parts with probability one half: 2 inputs."""
    return 2.0 * inputs


def parted(points: int, inputs: int) -> float:
    """Return the probability that random points with random labels can be parted, by Cover's count."""
    return sum(math.comb(points - 1, k) for k in range(inputs)) / 2.0 ** (points - 1)


def separable(ctx: Ctx, *, inputs: int, trials: int = 31) -> float:
    """Return the median, over trials, of the most points that a linear classifier without bias parts exactly.

    Points are added until a linear programme finds no separating direction.
    """
    draw, found = np.random.default_rng(ctx.seed_for("points")), []
    for _ in range(trials):
        signed = draw.standard_normal((6 * inputs, inputs))
        low, high = inputs, 6 * inputs
        while high - low > 1:
            middle = (low + high) // 2
            result = scipy.optimize.linprog(
                np.zeros(inputs), A_ub=-signed[:middle], b_ub=-np.ones(middle), bounds=(None, None), method="highs"
            )
            low, high = (middle, high) if result.status == 0 else (low, middle)
        found.append(low)
    return float(np.median(found))
