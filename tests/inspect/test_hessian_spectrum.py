"""Hessian spectra against torch.func.hessian and eigvalsh in float64, and against scipy."""

from __future__ import annotations

import math

import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

from nervure._kit import UsageError
from nervure.core.lanczos import exact_density, spectral_density
from nervure.core.vectors import flatten, select, unflatten
from nervure.inspect._hessian_trial import of_same_covariance, outliers
from nervure.inspect.hessian_spectrum import eigenspace_overlap, spectrum


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(4, 5)

    def forward(self, x):
        x = F.silu(self.stem(x))
        return self.head(F.silu(x + self.norm(self.block(x))).mean((2, 3)))


class _Known:
    """Multiply by a matrix that is at hand: far cheaper than by double backward passes."""

    def __init__(self, matrix):
        self.matrix, self.size, self.dtype, self.device = matrix.detach(), len(matrix), matrix.dtype, matrix.device

    def __matmul__(self, vector):
        return self.matrix @ vector


def _problem():
    return Residual().double(), (torch.randn(24, 1, 5, 5).double(), torch.randint(0, 5, (24,)))


def _truth(model, batch):
    chosen = select(model)
    start = flatten(chosen).detach()

    def mean_loss(vector):
        return F.cross_entropy(functional_call(model, unflatten(vector, chosen), (batch[0],)), batch[1])

    matrix = jacrev(jacrev(mean_loss))(start)
    return matrix, torch.linalg.eigvalsh(matrix)


def test_dense_and_iterative_paths_equal_the_exact_spectrum():
    model, batch = _problem()
    matrix, truth = _truth(model, batch)
    order = truth.abs().argsort(descending=True)[:5]
    dense = spectrum(model, batch, k=5)
    torch.testing.assert_close(dense.spectrum, truth, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(dense.eigenvalues, truth[order], rtol=1e-9, atol=0)
    assert dense.trace.value == pytest.approx(float(matrix.trace()))
    lanczos = spectrum(model, batch, k=5, dense_below=0, tolerance=1e-7)
    torch.testing.assert_close(lanczos.eigenvalues, truth[order], rtol=1e-6, atol=0)
    scipy_values = scipy.sparse.linalg.eigsh(matrix.numpy(), 5, which="LM")[0]
    assert sorted(lanczos.eigenvalues.tolist()) == pytest.approx(sorted(scipy_values.tolist()), rel=1e-6)
    assert lanczos.verdict == dense.verdict == "ok"
    assert lanczos.trace.low <= float(matrix.trace()) <= lanczos.trace.high
    density = spectral_density(_Known(matrix), probes=100, steps=60)
    step = float(density.grid[1] - density.grid[0])
    exact = exact_density(truth, density.grid, density.width)
    assert float((density.values - exact).abs().sum()) * step < 0.05
    assert lanczos.share_near_zero() == pytest.approx(dense.share_near_zero(), abs=0.06)
    assert eigenspace_overlap(lanczos.vectors[:, :3], dense.vectors[:, :3]) == pytest.approx(1, abs=1e-6)


def test_many_batches_and_float64_copy():
    model, (x, y) = _problem()
    whole = spectrum(model, (x, y), k=3)
    parts = spectrum(model, [(x[:9], y[:9]), (x[9:], y[9:])], k=3)
    torch.testing.assert_close(whole.eigenvalues, parts.eigenvalues)
    copy = spectrum(model.float(), (x.float(), y), k=3, dtype=torch.float64)
    assert copy.eigenvalues.dtype == torch.float64
    assert next(model.parameters()).dtype == torch.float32
    torch.testing.assert_close(copy.eigenvalues, whole.eigenvalues, rtol=1e-5, atol=1e-6)


def test_unconverged_is_cannot_tell():
    model, batch = _problem()
    report = spectrum(model, batch, k=5, dense_below=0, limit=6, tolerance=1e-12)
    assert report.verdict == "cannot tell"
    assert not bool(report.converged.all())


def test_gauss_newton_is_positive_and_bad_numbers_are_refused():
    model, batch = _problem()
    assert float(spectrum(model, batch, k=1, matrix="gauss_newton").spectrum.min()) > -1e-12
    with pytest.raises(UsageError):
        spectrum(model, batch, k=0)
    with pytest.raises(UsageError):
        spectrum(model, batch, matrix="jacobian")


def test_what_the_digits_claim_measures():
    source = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 3, generator=source).double() @ torch.tensor([[2.0, 1, 0], [0, 1, 0], [0, 0, 0.3]]).double()
    drawn = of_same_covariance(x + 5, source)
    torch.testing.assert_close(drawn.mean(0), x.mean(0) + 5, rtol=0, atol=0.2)
    torch.testing.assert_close(drawn.T.cov(), x.T.cov(), rtol=0.12, atol=0.05)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    batch = (torch.randn(40, 4, generator=source).double(), torch.randint(0, 5, (40,), generator=source))
    values = _truth(model, batch)[1].flip(0)
    last = values[math.ceil(0.1 * len(values)) - 1]
    assert outliers(model, *batch, edge=0.1, factor=1.5) == int((values > 1.5 * last).sum()) > 0
