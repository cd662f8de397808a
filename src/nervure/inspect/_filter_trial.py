"""What the claim on filter quality trains and draws."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure.spec import Ctx


class Narrow(nn.Module):
    """Three convolutions of 16, 32 and 64 channels, or so many times as wide, for 14 x 14 images."""

    def __init__(self, times: int, draw: torch.Generator) -> None:
        super().__init__()
        widths = [16 * times, 32 * times, 64 * times]
        self.conv1 = nn.Conv2d(1, widths[0], 3, padding=1)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3, padding=1)
        self.conv3 = nn.Conv2d(widths[1], widths[2], 3, padding=1)
        self.head = nn.Linear(widths[2], 10)
        for value in self.parameters():
            if value.ndim > 1:
                nn.init.kaiming_normal_(value, generator=draw)
            else:
                nn.init.zeros_(value)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        return self.head(self.conv3(x).relu().mean((2, 3)))


def pooled(images: Tensor) -> Tensor:
    """Return images of half the height and width."""
    return F.avg_pool2d(images, 2)


def fit(ctx: Ctx, model: Narrow, x: Tensor, y: Tensor, *, epochs: int, decay: float = 0.0) -> Narrow:
    """Train in place by SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=decay)
    draw = ctx.generator("batches")
    for epoch in range(epochs):
        for index in torch.randperm(len(x), generator=draw).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
        ctx.progress(epoch + 1, epochs, f"epoch {epoch + 1}")
    return model


def shuffled_kernels(model: Narrow, draw: torch.Generator) -> Narrow:
    """Return the model with every layer's weights shuffled among all their places."""
    for module in (model.conv1, model.conv2, model.conv3):
        flat = module.weight.data.flatten()
        module.weight.data = flat[torch.randperm(len(flat), generator=draw)].view_as(module.weight)
    return model


def random_kernels(
    draw: torch.Generator, entropy: Callable[[Tensor], float], above: Callable[[int, int], float], *, draws: int = 20
) -> float:
    """Return the least share, over 64 to 16,384 kernels, of Gaussian draws whose entropy exceeds the threshold."""
    shares = []
    for power in range(6, 15):
        found = [entropy(torch.randn(2**power, 9, generator=draw, dtype=torch.float64)) for _ in range(draws)]
        shares.append(sum(one > above(2**power, 9) for one in found) / draws)
    return min(shares)
