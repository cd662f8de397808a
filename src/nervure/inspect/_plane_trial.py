"""What the claim on the information plane trains: several small networks as one, on all patterns of twelve bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nervure.spec import Ctx

WIDTHS = (12, 10, 7, 5, 4, 3, 2)
Activation = Callable[[Tensor], Tensor]


def patterns() -> tuple[Tensor, Tensor]:
    """Return all 4,096 patterns of twelve bits, as -1 and 1, and their labels.

    The bits are points on the twelve corners of an icosahedron. The label says whether the power of the pattern's
    first two spherical harmonics is above its median; turning the solid does not change it.
    """
    golden = (1 + 5**0.5) / 2
    corners = torch.tensor(
        [point for a in (-1.0, 1.0) for b in (-golden, golden) for point in ((0.0, a, b), (a, b, 0.0), (b, 0.0, a))],
        dtype=torch.float64,
    )
    cosines = F.normalize(corners) @ F.normalize(corners).T
    kernel = cosines + (3 * cosines.square() - 1) / 2  # Legendre polynomials of degree one and two
    bits = (torch.arange(4096)[:, None] >> torch.arange(12) & 1).double()
    power = ((bits @ kernel) * bits).sum(1).round(decimals=6)
    return (2 * bits - 1).float(), (power > power.median()).long()


class Nets:
    """Several perceptrons 12-10-7-5-4-3-2 of one activation, run as one."""

    def __init__(self, count: int, draw: torch.Generator) -> None:
        self.weights = [
            (torch.randn(count, one, two, generator=draw) / one**0.5).requires_grad_()
            for one, two in itertools.pairwise(WIDTHS)
        ]
        self.biases = [torch.zeros(count, 1, two, requires_grad=True) for two in WIDTHS[1:]]

    def hidden(self, x: Tensor, activation: Activation) -> list[Tensor]:
        """Return every layer's outputs, shape (count, N, width); the last are the scores."""
        found = [x.expand(len(self.weights[0]), *x.shape)]
        for weight, bias in zip(self.weights, self.biases, strict=True):
            before = found[-1] if len(found) == 1 else activation(found[-1])
            found.append(torch.baddbmm(bias, before, weight))
        return [*(activation(one) for one in found[1:-1]), found[-1]]


def histories(
    ctx: Ctx, activation: Activation, x: Tensor, y: Tensor, *, count: int, epochs: int, wanted: Sequence[int]
) -> Iterator[list[Tensor]]:
    """Train by SGD with momentum, all networks on the same batches.

    Yields:
        The hidden layers on all patterns after each wanted epoch.
    """
    nets = Nets(count, ctx.generator("weights"))
    parameters = [*nets.weights, *nets.biases]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    draw = ctx.generator("batches")
    for epoch in range(1, epochs + 1):
        for index in torch.randperm(len(x), generator=draw).split(256):
            optimizer.zero_grad()
            scores = nets.hidden(x[index], activation)[-1]
            F.cross_entropy(scores.flatten(0, 1), y[index].repeat(count)).mul(count).backward()
            optimizer.step()
        if epoch in wanted:
            with torch.no_grad():
                yield nets.hidden(x, activation)
