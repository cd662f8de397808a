"""The networks of the decision tree's claim, their patterns counted by sampling, and a learned tree beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Inputs and hidden widths.
NETS = {"1-(2,2)": (1, (2, 2)), "2-(8)": (2, (8,)), "2-(8,8)": (2, (8, 8)), "4-(8,8)": (4, (8, 8))}
SIDE = 2.0


def network(inputs: int, hidden: Sequence[int], draw: torch.Generator) -> nn.Sequential:
    """Return a ReLU network in float64, weights of variance 2 / fan-in and biases of deviation 0.5."""
    layers: list[nn.Module] = []
    for before, after in zip((inputs, *hidden), (*hidden, 1), strict=True):
        layer = nn.Linear(before, after).double()
        with torch.no_grad():
            layer.weight.copy_(torch.randn(after, before, generator=draw) * (2 / before) ** 0.5)
            layer.bias.copy_(0.5 * torch.randn(after, generator=draw))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional(draw: torch.Generator) -> nn.Sequential:
    """Return three convolutions and a linear layer for 8 x 8 images of one channel."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    with torch.no_grad():
        for value in model.parameters():
            fan_in = value[0].numel() if value.ndim > 1 else math.inf
            value.copy_(torch.randn(value.shape, generator=draw) * (2 / fan_in) ** 0.5)
    return model


def drawn(count: int, inputs: int, draw: torch.Generator) -> Tensor:
    """Return points drawn evenly from the box, shape (count, inputs)."""
    return SIDE * (2 * torch.rand(count, inputs, generator=draw, dtype=torch.float64) - 1)


def grid(side: int) -> Tensor:
    """Return a grid over the box of two inputs, the same number of points along each."""
    line = torch.linspace(-SIDE, SIDE, side, dtype=torch.float64)
    return torch.cartesian_prod(line, line)


@torch.no_grad()
def patterns(model: nn.Sequential, points: Tensor) -> Tensor:
    """Return the number of each point's pattern of active units, shape (N,), the network run as it is."""
    code, x = torch.zeros(len(points), dtype=torch.long), points
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            for unit in x.T:
                code = 2 * code + (unit > 0)
    return code


def regions(inputs: int, hidden: Sequence[int]) -> int:
    """Return the most linear regions: Zaslavsky's count of each layer's hyperplanes, multiplied over the layers."""
    return math.prod(sum(math.comb(width, k) for k in range(min(inputs, width) + 1)) for width in hidden)


def learned(x: Tensor, y: Tensor, at: Tensor, *, leaves: int) -> Tensor:
    """Return the predictions of a regression tree of as many leaves, fitted to a network's outputs."""
    # Imported here: it takes a second that the tree itself does not need.
    from sklearn.tree import DecisionTreeRegressor

    tree = DecisionTreeRegressor(max_leaf_nodes=max(2, leaves), random_state=0).fit(x.numpy(), y.numpy().ravel())
    return torch.from_numpy(tree.predict(at.numpy()))[:, None]
