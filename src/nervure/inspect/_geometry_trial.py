"""What the claim on learned geometry trains: one hidden layer on noisy points at latent binary patterns."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def latent_patterns(
    count: int, draw: torch.Generator, *, bits: int = 4, width: int = 100, noise: float = 1.0
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a source of samples: inputs, shape (count, width), and their bits of -1 and 1, shape (count, bits).

    Every bit moves the point along a normal direction of its own, by one in each coordinate for all bits together.
    """
    directions = torch.randn(bits, width, generator=draw) / bits**0.5

    def sample() -> tuple[Tensor, Tensor]:
        z = 2.0 * torch.randint(2, (count, bits), generator=draw) - 1
        return z @ directions + noise * torch.randn(count, width, generator=draw), z

    return sample


class Committee(nn.Module):
    """A hidden layer whose outputs are averaged with fixed signs, half of each."""

    def __init__(self, width: int, hidden: int, activation: nn.Module, draw: torch.Generator) -> None:
        super().__init__()
        self.first, self.activation = nn.Linear(width, hidden), activation
        nn.init.normal_(self.first.weight, std=1 / width**0.5, generator=draw)
        nn.init.zeros_(self.first.bias)
        self.signs: Tensor
        self.register_buffer("signs", 1.0 - 2.0 * (torch.arange(hidden) % 2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.activation(self.first(x)) * self.signs).mean(1)


def fit(
    model: Committee, source: Callable[[], tuple[Tensor, Tensor]], target: Callable[[Tensor], Tensor], *, steps: int
) -> Committee:
    """Train the hidden layer in place on squared errors by SGD, every step on new samples."""
    # The mean over hidden units divides every unit's gradient by their number; the rate makes up for it.
    optimizer = torch.optim.SGD(model.first.parameters(), lr=0.005 * model.first.out_features)
    for _ in range(steps):
        x, bits = source()
        optimizer.zero_grad()
        F.mse_loss(model(x), target(bits)).backward()
        optimizer.step()
    return model
