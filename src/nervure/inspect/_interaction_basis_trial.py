"""What the claim on the interaction basis compares: a network with maps inserted after a layer, and other bases."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

from nervure.spec import Ctx, Data

Basis = tuple[Tensor, Tensor]


def fitted(ctx: Ctx, data: Data) -> nn.Sequential:
    """Return an MLP 64-32-64-10 after 200 steps on digits, in float64."""
    draw = ctx.generator("weights")
    layers: list[tuple[str, nn.Module]] = []
    for name, inputs, outputs in (("first", 64, 32), ("second", 32, 64), ("head", 64, 10)):
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(outputs, inputs, generator=draw) * (2 / inputs) ** 0.5)
            layer.bias.zero_()
        layers += [(name, layer), (f"{name}-relu", nn.ReLU())]
    model = nn.Sequential(OrderedDict(layers[:-1]))
    ctx.train(model, data, steps=ctx.scaled(200, 50))
    return model.double()


class Appended(nn.Module):
    """Append rectified random combinations of the units.

    Args:
        weight: Shape (new units, units).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the units and the new ones."""
        return torch.cat([x, torch.relu(x @ self.weight.T)], -1)


def linear(weight: Tensor) -> nn.Linear:
    """Return a linear layer without bias, in float64."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    layer.weight.data.copy_(weight)
    return layer


def inserted(model: nn.Sequential, there: nn.Module, weight: Tensor) -> nn.Sequential:
    """Return a copy with a map after the first hidden layer, and other weights that read from it."""
    changed = copy.deepcopy(model)
    reader = linear(weight)
    reader.bias = nn.Parameter(changed.get_parameter("second.bias").detach().clone())
    names = dict(changed.named_children())
    return nn.Sequential(
        OrderedDict(
            (key, reader if key == "second" else layer)
            for name, layer in names.items()
            for key, layer in ((("there", there), (name, layer)) if name == "second" else ((name, layer),))
        )
    )


def conditioned(units: int, condition: float, draw: torch.Generator) -> Tensor:
    """Return a random matrix of a condition number: random rotations around evenly spaced logarithms."""
    one, two = (torch.linalg.qr(torch.randn(units, units, generator=draw, dtype=torch.float64))[0] for _ in range(2))
    return one * torch.logspace(0, -float(torch.tensor(condition).log10()), units, dtype=torch.float64) @ two


def dependent(weight: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a map that appends five copies and three combinations of the units, and random weights that undo it.

    The new weights W' of full rank satisfy W' E = W, with E the map and W the old weights.
    """
    units = weight.shape[1]
    copies = torch.eye(units, dtype=torch.float64)[torch.randperm(units, generator=draw)[:5]]
    combined = torch.randn(3, units, generator=draw, dtype=torch.float64) / units**0.5
    there = torch.cat([torch.eye(units, dtype=torch.float64), copies, combined])
    known = torch.linalg.pinv(there)
    free = torch.randn(len(weight), len(there), generator=draw, dtype=torch.float64) / len(there) ** 0.5
    return there, weight @ known + free @ (torch.eye(len(there), dtype=torch.float64) - there @ known)


def principal(activations: Tensor) -> Basis:
    """Return variances and coordinates in the basis of principal components."""
    centred = activations - activations.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    return values.flip(0), centred @ vectors.flip(1)


def plain(activations: Tensor) -> Basis:
    """Return mean squares and the units themselves."""
    return activations.square().mean(0), activations


def deviation(one: Basis, two: Basis) -> float:
    """Return the largest relative difference of two bases' values, and of their coordinates up to sign."""
    (values, first), (others, second) = one, two
    if first.shape != second.shape:
        return 1.0
    turned = second * (first * second).sum(0).sign()
    apart = (first - turned).norm(dim=0) / torch.maximum(first.norm(dim=0), second.norm(dim=0)).clamp_min(1e-300)
    moved = (values - others).abs() / torch.maximum(values, others).clamp_min(1e-300)
    return float(torch.maximum(apart.max(), moved.max()))
