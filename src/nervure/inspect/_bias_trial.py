"""The hypotheses of the claim on bits of inductive bias: posterior draws and trained networks."""

from __future__ import annotations

import torch
from torch import Tensor

TRAIN, TEST = 40, 60


def target(x: Tensor) -> Tensor:
    """Return sum_i sin(3 x_i) / sqrt(d)."""
    return torch.sin(3 * x).sum(1) / x.shape[1] ** 0.5


def points(inputs: int, draw: torch.Generator, *, noise: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw training and test points from the cube [-1, 1]^d, with the target or with noise of its size."""
    x = 2 * torch.rand(TRAIN + TEST, inputs, generator=draw, dtype=torch.float64) - 1
    y = torch.randn(TRAIN + TEST, generator=draw, dtype=torch.float64) * 0.7 if noise else target(x)
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


def posterior(inputs: int, draw: torch.Generator, *, length: float = 1.0, noise: bool = False) -> tuple[Tensor, Tensor]:
    """Return the mean of the test residuals under the posterior of a Gaussian process, and a root of its covariance."""
    x, y, new, truth = points(inputs, draw, noise=noise)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / (2 * length**2))

    inside = torch.linalg.cholesky(kernel(x, x) + 1e-8 * torch.eye(TRAIN, dtype=torch.float64))
    half = torch.linalg.solve_triangular(inside, kernel(x, new), upper=False)
    mean = half.T @ torch.linalg.solve_triangular(inside, y[:, None], upper=False)[:, 0]
    values, vectors = torch.linalg.eigh(kernel(new, new) - half.T @ half)
    return mean - truth, vectors * values.clamp_min(0).sqrt()


def interpolant_errors(
    inputs: int, draws: int, draw: torch.Generator, *, length: float = 1.0, noise: bool = False
) -> Tensor:
    """Return the mean squared test errors of draws from the posterior."""
    mean, root = posterior(inputs, draw, length=length, noise=noise)
    z = torch.randn(draws, root.shape[1], generator=draw, dtype=torch.float64)
    return (mean + z @ root.T).square().mean(1)


def network_errors(inputs: int, count: int, draw: torch.Generator, *, steps: int, width: int = 64) -> Tensor:
    """Return the mean squared test errors of networks trained together from different starts, by Adam."""
    x, y, new, truth = points(inputs, draw)
    sizes = ((inputs, width), (width, width), (width, 1))
    weights = [torch.randn(count, a, b, generator=draw, dtype=torch.float64) / a**0.5 for a, b in sizes]
    biases = [0.5 * torch.randn(count, 1, b, generator=draw, dtype=torch.float64) for _, b in sizes]
    parameters = [value.requires_grad_() for value in (*weights, *biases)]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def predict(points: Tensor) -> Tensor:
        h = points.expand(count, -1, -1)
        for place, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            h = torch.baddbmm(bias, h, weight)
            h = h.tanh() if place < len(sizes) - 1 else h
        return h.squeeze(2)

    for _ in range(steps):
        optimizer.zero_grad()
        # A sum over networks: each has the gradient of its own mean.
        (predict(x) - y).square().mean(1).sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return (predict(new) - truth).square().mean(1)
