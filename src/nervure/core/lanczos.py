"""Eigenpairs, spectral densities and traces of a symmetric operator known by its products alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import scipy.stats
import torch
from torch import Tensor

from nervure._kit import UsageError
from nervure.core.rng import generator

Which = Literal["magnitude", "largest", "smallest"]
CHECK = 5


class Symmetric(Protocol):
    """Say what is needed of an operator."""

    size: int
    dtype: torch.dtype
    device: torch.device

    def __matmul__(self, vector: Tensor) -> Tensor:
        """Multiply a vector, shape (P,)."""


@dataclass(frozen=True)
class Eigenpairs:
    """Hold eigenpairs and the proof of their quality.

    Args:
        values: Shape (k,), the wanted end first.
        vectors: Unit eigenvectors as columns, shape (P, k).
        residuals: The norms |A v - value v|: each value lies within its residual of a true eigenvalue.
        converged: Whether the residual is below the tolerance times the largest magnitude found.
        products: Products with the operator.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    products: int


def eigenpairs(
    operator: Symmetric,
    k: int,
    *,
    which: Which = "magnitude",
    tolerance: float = 1e-4,
    limit: int = 500,
    block: int = 1,
    seed: int = 0,
) -> Eigenpairs:
    """Compute eigenpairs at an end of the spectrum by block Lanczos with full reorthogonalisation.

    The pairs come back with their residuals; those that did not converge within the limit are flagged, never hidden.
    An eigenvalue of multiplicity above `block` may be found fewer times than it has vectors.

    Args:
        operator: The symmetric operator.
        k: Number of pairs, at least 1, at most the operator's size.
        which: The end: largest "magnitude", "largest" or "smallest" value.
        tolerance: Residual relative to the largest magnitude.
        limit: Most products with the operator.
        block: Vectors multiplied in one step, at least 1.
        seed: Seed of the start.

    Returns:
        The pairs.

    Raises:
        UsageError: If a number is outside its range.
    """
    if not 1 <= k <= operator.size or block < 1 or limit < k:
        raise UsageError(
            "no such eigenpairs", expected=f"1 <= k <= {operator.size}, block >= 1, limit >= k", found=(k, block, limit)
        )
    source = generator("lanczos", seed)
    block = min(block, operator.size)
    # Rows of these are basis vectors and their images; they double when they are full.
    basis = _orthonormal(_normal(operator, block, source), _normal(operator, 0, source), source)
    Q, A = basis.new_empty(32, operator.size), basis.new_empty(32, operator.size)
    small = basis.new_zeros(0, 0)
    done, checked = 0, 0
    while True:
        new = slice(done, done + len(basis))
        if new.stop > len(Q):
            Q, A = torch.cat([Q, torch.empty_like(Q)]), torch.cat([A, torch.empty_like(A)])
        Q[new] = basis
        for row in range(new.start, new.stop):
            A[row] = operator @ Q[row]
        done = new.stop
        columns = Q[:done] @ A[new].T
        small = torch.cat([torch.cat([small, columns[: new.start].T]), columns], 1)
        last = done >= min(limit, operator.size)
        if last or done >= max(k, checked + CHECK):
            checked = done
            found = _ritz(Q[:done], A[:done], small, k=k, which=which, tolerance=tolerance)
            if last or bool(found.converged.all()):
                return found
        width = min(block, operator.size - done, limit - done)
        basis = _orthonormal(A[new][:width], Q[:done], source)


def _ritz(Q: Tensor, A: Tensor, small: Tensor, *, k: int, which: Which, tolerance: float) -> Eigenpairs:
    """Return the best eigenpairs within a basis, with true residuals."""
    theta, S = torch.linalg.eigh((small + small.T) / 2)
    order = _order(theta, which)[:k]
    values, S = theta[order], S[:, order]
    vectors = S.T @ Q
    residuals = (S.T @ A - vectors * values.unsqueeze(1)).norm(dim=1)
    return Eigenpairs(values, vectors.T, residuals, residuals <= tolerance * theta.abs().max(), len(Q))


def _order(theta: Tensor, which: Which) -> Tensor:
    key = {"magnitude": theta.abs(), "largest": theta, "smallest": -theta}[which]
    return key.argsort(descending=True)


def _normal(operator: Symmetric, count: int, source: torch.Generator) -> Tensor:
    return torch.randn(count, operator.size, generator=source, dtype=operator.dtype).to(operator.device)


def _orthonormal(block: Tensor, against: Tensor, source: torch.Generator) -> Tensor:
    """Return orthonormal rows, orthogonal to a basis; directions already spanned are drawn anew."""
    rows = against
    bound = 100 * torch.finfo(block.dtype).eps
    for vector in block:
        size = vector.norm()
        while True:
            for _ in range(2):
                vector = vector - (rows @ vector) @ rows
            if vector.norm() > bound * size:
                break
            vector = torch.randn(len(vector), generator=source, dtype=block.dtype).to(block.device)
            size = vector.norm()
        rows = torch.cat([rows, (vector / vector.norm()).unsqueeze(0)])
    return rows[len(against) :]


@dataclass(frozen=True)
class Density:
    """Hold a spectral density.

    Args:
        grid: Points, shape (G,).
        values: Density at the points, shape (G,); it integrates to one over the line.
        error: Standard error over probes, shape (G,).
        nodes: Ritz values of all probes.
        weights: Their weights, which sum to one.
        width: Standard deviation of the Gaussian each node was spread to.
    """

    grid: Tensor
    values: Tensor
    error: Tensor
    nodes: Tensor
    weights: Tensor
    width: float

    def share_below(self, bound: float) -> float:
        """Return the share of eigenvalues of magnitude below a bound, by the unspread weights."""
        return float(self.weights[self.nodes.abs() < bound].sum())


def spectral_density(
    operator: Symmetric, *, probes: int = 8, steps: int = 60, width: float = 0.01, points: int = 400, seed: int = 0
) -> Density:
    """Estimate the spectral density by stochastic Lanczos quadrature.

    Args:
        operator: The symmetric operator.
        probes: Random start vectors, at least 2.
        steps: Lanczos steps for each, at least 1.
        width: Standard deviation of the Gaussian around each node, relative to the spectrum's range.
        points: Points of the grid.
        seed: Seed of the probes.

    Returns:
        The density, with its standard error over probes.

    Raises:
        UsageError: If a number is outside its range.
    """
    if probes < 2 or steps < 1 or width <= 0 or points < 2:
        raise UsageError("no such quadrature", expected="probes >= 2, steps >= 1, width > 0, points >= 2")
    source = generator("quadrature", seed)
    pairs = [_quadrature(operator, min(steps, operator.size), source) for _ in range(probes)]
    nodes = torch.cat([theta for theta, _ in pairs])
    low, high = float(nodes.min()), float(nodes.max())
    spread = width * max(high - low, 1e-12 * max(abs(high), 1.0))
    grid = torch.linspace(low - 4 * spread, high + 4 * spread, points, dtype=torch.float64)
    curves = torch.stack([_gaussians(grid, theta, weights, spread) for theta, weights in pairs])
    weights = torch.cat([weights for _, weights in pairs]) / probes
    return Density(grid, curves.mean(0), curves.std(0) / math.sqrt(probes), nodes, weights, spread)


def _quadrature(operator: Symmetric, steps: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return Ritz values and squared first components of one Lanczos run with full reorthogonalisation."""
    q = _normal(operator, 1, source)[0]
    Q = q.new_empty(steps, operator.size)
    Q[0] = q / q.norm()
    alphas: list[float] = []
    betas: list[float] = []
    for step in range(steps):
        image = operator @ Q[step]
        alphas.append(float(Q[step] @ image))
        rest = image
        for _ in range(2):
            rest = rest - (Q[: step + 1] @ rest) @ Q[: step + 1]
        beta = float(rest.norm())
        if step + 1 == steps or beta <= 100 * torch.finfo(operator.dtype).eps * max(float(image.norm()), 1e-30):
            break
        betas.append(beta)
        Q[step + 1] = rest / beta
    diagonal, off = torch.tensor(alphas, dtype=torch.float64), torch.tensor(betas, dtype=torch.float64)
    theta, S = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    return theta, S[0].square()


def _gaussians(grid: Tensor, nodes: Tensor, weights: Tensor, width: float) -> Tensor:
    z = (grid.unsqueeze(1) - nodes) / width
    return (torch.exp(-0.5 * z * z) @ weights) / (width * math.sqrt(2 * math.pi))


def exact_density(values: Tensor, grid: Tensor, width: float) -> Tensor:
    """Return the density of known eigenvalues, each spread to a Gaussian.

    Args:
        values: The eigenvalues.
        grid: Points.
        width: Standard deviation.

    Returns:
        The density at the points.
    """
    return _gaussians(grid, values.double(), torch.full((len(values),), 1 / len(values), dtype=torch.float64), width)


@dataclass(frozen=True)
class Trace:
    """Hold an estimated trace.

    Args:
        value: The estimate.
        low: Lower end of the 95% t interval over probes.
        high: Upper end.
        products: Products with the operator.
    """

    value: float
    low: float
    high: float
    products: int


def trace(operator: Symmetric, *, products: int = 60, method: Literal["hutch++", "hutchinson"] = "hutch++",
          seed: int = 0) -> Trace:  # fmt: skip
    """Estimate the trace with random signs.

    Hutchinson averages z' A z. Hutch++ spends a third of the products on a basis Q of the dominant range, takes
    tr(Q' A Q) exactly and averages only what is left.

    Args:
        operator: The symmetric operator.
        products: Products with the operator, at least 6.
        method: The estimator.
        seed: Seed of the probes.

    Returns:
        The trace with its interval.

    Raises:
        UsageError: If there are too few products.
    """
    if products < 6:
        raise UsageError("too few products for an interval", expected="at least 6", found=products)
    source = generator("trace", seed)

    def signs() -> Tensor:
        draw = torch.randint(0, 2, (operator.size,), generator=source)
        return (2 * draw - 1).to(operator.device, operator.dtype)

    known, spent = 0.0, 0
    Q = torch.zeros(operator.size, 0, dtype=operator.dtype, device=operator.device)
    if method == "hutch++":
        count = min(products // 3, operator.size)
        Q = torch.linalg.qr(torch.stack([operator @ signs() for _ in range(count)], 1))[0]
        known = float(sum(q @ (operator @ q) for q in Q.T))
        spent = 2 * count
    if Q.shape[1] == operator.size:
        return Trace(known, known, known, spent)
    samples = []
    for _ in range(products - spent):
        z = signs()
        z = z - Q @ (Q.T @ z)
        samples.append(float(z @ (operator @ z)))
    parts = torch.tensor(samples, dtype=torch.float64)
    centre = known + float(parts.mean())
    half = float(scipy.stats.t.ppf(0.975, len(samples) - 1)) * float(parts.std()) / math.sqrt(len(samples))
    return Trace(centre, centre - half, centre + half, products)
