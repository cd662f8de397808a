"""What the claim on transfer trains."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure.spec import Ctx


class Extractor(nn.Module):
    """A ReLU perceptron 196-256-256-128 and a linear layer on top."""

    def __init__(self, classes: int, draw: torch.Generator) -> None:
        super().__init__()
        widths = [196, 256, 256, 128]
        self.layers = nn.ModuleList(nn.Linear(one, two) for one, two in itertools.pairwise(widths))
        self.head = nn.Linear(widths[-1], classes)
        for layer in [*self.layers, self.head]:
            nn.init.kaiming_normal_(layer.weight, generator=draw)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def fit(ctx: Ctx, model: Extractor, x: Tensor, y: Tensor, *, steps: int) -> Extractor:
    """Train in place by Adam in batches of 128."""
    optimizer, draw = torch.optim.Adam(model.parameters(), lr=1e-3), ctx.generator("batches")
    for _ in range(steps):
        index = torch.randint(len(x), (128,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    return model
