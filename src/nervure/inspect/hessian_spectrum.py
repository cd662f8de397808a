"""The spectrum of the loss Hessian: a bulk at zero, and outliers the Gauss-Newton part explains."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure._kit import UsageError
from nervure.core.forward import tree_map
from nervure.core.graph import as_batches
from nervure.core.lanczos import Density, Trace, eigenpairs, spectral_density, trace
from nervure.core.operators import Operator, gauss_newton, hessian
from nervure.core.persample import Loss
from nervure.inspect._hessian_trial import barrier, blobs, fit, of_same_covariance, outliers, sgd, tanh_mlp
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="hessian-spectrum",
    n=268,
    title="Empirical Analysis of the Hessian of Over-Parametrized Neural Networks",
    year=2017,
    link="https://arxiv.org/abs/1706.04454",
    family="inspect",
    summary=(
        "At a trained point the Hessian has a bulk at zero that grows with the number of parameters, and outliers that "
        "follow the data and come from the Gauss-Newton part; small- and large-batch solutions share a flat region."
    ),
    tags=("Hessian", "eigenvalues", "spectrum", "Lanczos", "sharpness", "trace", "flatness"),
    provides=("spectrum", "HessianSpectrum", "eigenspace_overlap"),
    protocol="diagnostic",
    claims=(
        "bulk_grows_with_width",
        "bulk_grows_on_digits",
        "gauss_newton_explains_the_outliers",
        "no_barrier_between_batch_sizes",
    ),
    needs=("data", "labels"),
    deviations=(
        "Above a chosen size the spectrum is estimated by Lanczos quadrature; the paper forms every Hessian.",
        "The number of outliers is not claimed to equal that of the classes: small networks have no clean gap.",
    ),
    verified=(
        "Dense path equal to torch.func.hessian and eigvalsh in float64; Lanczos values to 1e-6 relative.",
        "Quadrature density within 0.05 in L1 of the exact one.",
    ),
)

Matrix = Literal["hessian", "gauss_newton"]


@dataclass(frozen=True)
class HessianSpectrum:
    """Report a spectrum and how far it can be trusted.

    Args:
        eigenvalues: The k of largest magnitude, largest magnitude first.
        residuals: |H v - value v| of each.
        converged: Whether each residual is below the tolerance times the largest magnitude.
        vectors: Their eigenvectors as columns, shape (P, k).
        spectrum: All eigenvalues in rising order where the dense path was taken, else None.
        density: The density by Lanczos quadrature, or None on the dense path.
        trace: The trace; on the dense path its interval is a point.
        parameters: Number of parameters.
        products: Products with the matrix.
    """

    eigenvalues: Tensor
    residuals: Tensor
    converged: Tensor
    vectors: Tensor
    spectrum: Tensor | None
    density: Density | None
    trace: Trace
    parameters: int
    products: int

    @property
    def verdict(self) -> str:
        """Return "ok", or "cannot tell" where an eigenvalue did not converge or a number is not finite."""
        fine = (
            bool(self.converged.all()) and bool(self.eigenvalues.isfinite().all()) and math.isfinite(self.trace.value)
        )
        return "ok" if fine else "cannot tell"

    def share_near_zero(self, fraction: float = 0.03) -> float:
        """Return the share of eigenvalues whose magnitude is below a fraction of the largest.

        Args:
            fraction: The fraction, in (0, 1).

        Returns:
            The share, exact on the dense path.
        """
        bound = fraction * float(self.eigenvalues.abs().max())
        if self.spectrum is not None:
            return float((self.spectrum.abs() < bound).double().mean())
        assert self.density is not None
        return self.density.share_below(bound)


def spectrum(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    loss: Loss = F.cross_entropy,
    k: int = 10,
    matrix: Matrix = "hessian",
    parameters: Iterable[str] | None = None,
    dense_below: int = 3000,
    tolerance: float = 1e-4,
    limit: int = 300,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> HessianSpectrum:
    """Compute the spectrum of the Hessian of the mean loss, or of its Gauss-Newton part.

    Below `dense_below` parameters the matrix is formed and solved exactly. Above, the k eigenvalues of largest
    magnitude come from Lanczos with full reorthogonalisation and a residual test, the density from stochastic Lanczos
    quadrature and the trace from Hutch++.

    Differs from the paper: it forms every Hessian.

    Args:
        model: The model, in the mode it is in; live dropout and batch normalisation in train mode are refused.
        batches: One batch (inputs, targets) or a sequence of batches, over which the loss is averaged.
        loss: From (output, targets) to the mean loss of a batch.
        k: Number of eigenpairs, at least 1.
        matrix: "hessian" or "gauss_newton".
        parameters: Names or prefixes; None takes all that require a gradient.
        dense_below: Most parameters for the dense path.
        tolerance: Residual relative to the largest magnitude that counts as converged.
        limit: Most products for the eigenpairs.
        dtype: Compute on a copy of the model in this precision; None computes in the model's own.
        seed: Seed of start vectors and probes.

    Returns:
        The report; its `verdict` is "cannot tell" where an eigenvalue did not converge.

    Raises:
        UsageError: If k or the matrix is not possible.

    Examples:
        >>> batch = (torch.randn(32, 4), torch.randint(0, 3, (32,)))
        >>> report = spectrum(nn.Linear(4, 3), batch, k=2, dtype=torch.float64)
        >>> report.verdict, report.parameters, report.trace.value > 0
        ('ok', 15, True)
    """
    if matrix not in ("hessian", "gauss_newton"):
        raise UsageError("no such matrix", expected='"hessian" or "gauss_newton"', found=matrix)
    every = as_batches(batches)
    if dtype is not None:
        model, every = _in_precision(model, every, dtype)
    make = hessian if matrix == "hessian" else gauss_newton
    operator = make(model, every, loss, parameters=parameters)
    if not 1 <= k <= operator.size:
        raise UsageError("no such number of eigenvalues", expected=f"1 to {operator.size}", found=k)
    if operator.size <= dense_below:
        return _dense(operator, k, tolerance)
    top = eigenpairs(operator, k, tolerance=tolerance, limit=max(limit, k), seed=seed)
    density = spectral_density(operator, seed=seed)
    whole = trace(operator, seed=seed)
    return HessianSpectrum(
        eigenvalues=top.values,
        residuals=top.residuals,
        converged=top.converged,
        vectors=top.vectors,
        spectrum=None,
        density=density,
        trace=whole,
        parameters=operator.size,
        products=operator.products,
    )


def _in_precision(model: nn.Module, batches: list[Batch], dtype: torch.dtype) -> tuple[nn.Module, list[Batch]]:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return copy.deepcopy(model).to(dtype), [(tree_map(cast, x), tree_map(cast, y)) for x, y in batches]


def _dense(operator: Operator, k: int, tolerance: float) -> HessianSpectrum:
    dense = operator.dense()
    spectrum, vectors = torch.linalg.eigh(dense)
    order = spectrum.abs().argsort(descending=True)[:k]
    values, chosen = spectrum[order], vectors[:, order]
    residuals = (dense @ chosen - chosen * values).norm(dim=0)
    total = float(spectrum.sum())
    return HessianSpectrum(
        eigenvalues=values,
        residuals=residuals,
        converged=residuals <= tolerance * spectrum.abs().max(),
        vectors=chosen,
        spectrum=spectrum,
        density=None,
        trace=Trace(total, total, total, operator.products),
        parameters=operator.size,
        products=operator.products,
    )


def eigenspace_overlap(first: Tensor, second: Tensor) -> float:
    """Return how much of one subspace lies in another: |U'V|^2 / dim, between 0 and 1.

    Args:
        first: Orthonormal columns, shape (P, k).
        second: Orthonormal columns, shape (P, k).

    Returns:
        The overlap.
    """
    return float((first.T @ second).square().sum() / first.shape[1])


@claim(
    CARD,
    checks=(
        Check.at_least("grows at every doubling, 4 blobs", method="widths", metric="least_growth_4", bound=0.0),
        Check.at_least("grows at every doubling, 6 blobs", method="widths", metric="least_growth_6", bound=0.0),
    ),
    sabotage={"one-width": "widths"},
    seeds=5,
    minutes=1.0,
)
def bulk_grows_with_width(ctx: Ctx) -> None:
    """At a trained point the share of Hessian eigenvalues below 3% of the largest grows at each doubling of the width.

    Gaussian blobs, tanh MLPs of width 8, 16 and 32, exact spectra in float64. The control trains three networks of
    one width from different starts, where nothing grows.
    """
    steps = ctx.scaled(300, 60)
    for classes in (4, 6):
        x, y = blobs(ctx, classes)
        shares: dict[str, list[float]] = {"widths": [], "one-width": []}
        for width in (8, 16, 32):
            for arm, size, tag in (("widths", width, "start"), ("one-width", 16, f"start {width}")):
                model = fit(tanh_mlp(ctx, size, 2, classes, tag), x, y, steps)
                shares[arm].append(spectrum(model, (x, y), k=1).share_near_zero())
        for arm, values in shares.items():
            growth = min(values[1] - values[0], values[2] - values[1])
            ctx.measure(arm, **{f"least_growth_{classes}": growth, f"share_widest_{classes}": values[-1]})


@claim(
    CARD,
    checks=(
        Check.at_least("grows at every step of the width", method="widths", metric="least_growth", bound=0.0),
        Check(name="more outliers than random data", method="widths", control="random data", metric="outliers"),
        Check.at_most("random data has none", method="random data", metric="outliers", bound=1.0),
    ),
    sabotage={"one-width": "widths"},
    seeds=5,
    minutes=2.0,
    data=("digits",),
)
def bulk_grows_on_digits(ctx: Ctx) -> None:
    """On digits too the share of eigenvalues below 3% of the largest grows with the width, and outliers need structure.

    512 images, tanh MLPs of width 16, 64 and 256 trained by 500 full-batch steps of Adam, densities by Lanczos
    quadrature. An outlier is an eigenvalue above three times the one at the upper 1%, counted at width 64. Random
    normal data of the digits' mean and covariance must have none. Shuffled labels are measured without a bound. The
    control trains three networks of width 64 from different starts, where nothing grows.
    """
    data = ctx.data("digits", train=512)
    x, y = data.train_x.flatten(1).double(), data.train_y
    steps = ctx.scaled(500, 50)
    shuffled = y[torch.randperm(len(y), generator=ctx.generator("shuffle"))]

    def trained(width: int, inputs: Tensor, labels: Tensor, tag: str = "start") -> nn.Module:
        ctx.progress(0, 0, f"width {width}")
        return fit(tanh_mlp(ctx, width, inputs.shape[1], 10, tag), inputs, labels, steps)

    def share(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
        return spectrum(model, (inputs, labels), k=1, dense_below=0).share_near_zero()

    arms = {
        "widths": [trained(width, x, y) for width in (16, 64, 256)],
        "one-width": [trained(64, x, y, f"start {copy}") for copy in range(3)],
    }
    for arm, models in arms.items():
        low, middle, high = (share(model, x, y) for model in models)
        ctx.measure(arm, least_growth=min(middle - low, high - middle), share_widest=high)
        ctx.measure(arm, outliers=outliers(models[1], x, y), accuracy=ctx.accuracy(models[1], x, y))
    random = of_same_covariance(x, ctx.generator("random data"))
    for arm, inputs, labels in (("random data", random, y), ("shuffled labels", x, shuffled)):
        model = trained(64, inputs, labels)
        ctx.measure(arm, share=share(model, inputs, labels), outliers=outliers(model, inputs, labels))
        ctx.measure(arm, accuracy=ctx.accuracy(model, inputs, labels))


@claim(
    CARD,
    checks=(Check.at_least("the top k-1 eigenspaces overlap", method="trained", metric="overlap", bound=0.8),),
    sabotage={"shuffled-labels": "trained"},
    seeds=5,
    minutes=0.5,
)
def gauss_newton_explains_the_outliers(ctx: Ctx) -> None:
    """At a trained point the top k-1 eigenvectors of the Hessian span what those of the Gauss-Newton part span.

    Gaussian blobs, k = 4, tanh MLP of width 16 trained to accuracy 1. The control asks the same of the same network
    under shuffled labels, where the residuals are large.
    """
    x, y = blobs(ctx, 4)
    model = fit(tanh_mlp(ctx, 16, 2, 4), x, y, ctx.scaled(300, 60))
    shuffled = y[torch.randperm(len(y), generator=ctx.generator("shuffle"))]
    accuracy = ctx.accuracy(model, x, y)
    for arm, labels in (("trained", y), ("shuffled-labels", shuffled)):
        pair = [spectrum(model, (x, labels), k=3, matrix=kind).vectors for kind in ("hessian", "gauss_newton")]
        ctx.measure(arm, overlap=eigenspace_overlap(*pair), accuracy=accuracy)


@claim(
    CARD,
    checks=(Check.at_most("the barrier is below 5% of that between starts", method="one-start", metric="barrier_ratio",
                          bound=0.05),),
    sabotage={"two-starts": "one-start"},
    seeds=5,
    minutes=1.0,
    data=("digits",),
)  # fmt: skip
def no_barrier_between_batch_sizes(ctx: Ctx) -> None:
    """The straight line from a small-batch to a large-batch solution of one start crosses no barrier to speak of.

    Digits, tanh MLP of width 64, batches of 16 and 512. The barrier is the largest excess of the training loss over the
    chord between the ends, relative to that between two solutions of different starts.
    """
    data = ctx.data("digits", train=1024)
    x, y = data.train_x.flatten(1).double(), data.train_y
    solutions = []
    for tag, size, steps in (("a", 16, 1920), ("a", 512, 600), ("b", 512, 600)):
        model = tanh_mlp(ctx, 64, x.shape[1], 10, tag)
        solutions.append(sgd(ctx, model, x, y, size=size, steps=ctx.scaled(steps, steps // 20)))
    near, far = barrier(solutions[0], solutions[1], x, y), barrier(solutions[0], solutions[2], x, y)
    for arm, value in (("one-start", near), ("two-starts", far)):
        ctx.measure(arm, barrier=value, barrier_ratio=value / max(far, 1e-12))
