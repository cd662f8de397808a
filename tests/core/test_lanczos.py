"""Lanczos, quadrature and trace estimators against numpy and scipy on matrices with known spectra."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from nervure._kit import UsageError
from nervure.core.lanczos import eigenpairs, exact_density, spectral_density, trace


class Matrix:
    def __init__(self, matrix):
        self.matrix, self.size, self.dtype, self.device = matrix, len(matrix), matrix.dtype, matrix.device
        self.products = 0

    def __matmul__(self, vector):
        self.products += 1
        return self.matrix @ vector


def _matrix(values):
    Q = torch.linalg.qr(torch.randn(len(values), len(values)).double())[0]
    return Matrix(Q @ torch.diag(torch.as_tensor(values).double()) @ Q.T)


@pytest.mark.parametrize(("which", "scipy_which"), [("magnitude", "LM"), ("largest", "LA"), ("smallest", "SA")])
def test_eigenpairs_equal_scipy(which, scipy_which):
    values = np.concatenate([np.random.default_rng(0).normal(size=194) * 0.1, [3, 2.5, 1.1, -0.9, -2.7, 1.05]])
    operator = _matrix(values)
    found = eigenpairs(operator, 5, which=which, tolerance=1e-8)
    truth = scipy.sparse.linalg.eigsh(operator.matrix.numpy(), 5, which=scipy_which)[0]
    assert np.allclose(np.sort(found.values.numpy()), np.sort(truth), rtol=1e-10)
    assert bool(found.converged.all())
    assert found.products == operator.products < 200
    residual = (operator.matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
    torch.testing.assert_close(found.residuals, residual, rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(5).double(), rtol=0, atol=1e-12)


def test_what_did_not_converge_is_flagged():
    operator = _matrix(np.linspace(0.9, 1, 300))
    found = eigenpairs(operator, 5, tolerance=1e-10, limit=12)
    assert found.products == 12
    assert not bool(found.converged.all())
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert np.abs(np.linspace(0.9, 1, 300) - float(value)).min() <= float(residual) + 1e-12


def test_multiplicity_up_to_the_block_and_a_low_rank_matrix():
    operator = _matrix([2.0] * 3 + [1.0] + [0.0] * 60)
    found = eigenpairs(operator, 4, block=3, tolerance=1e-10)
    torch.testing.assert_close(found.values, torch.tensor([2.0, 2, 2, 1]).double())
    whole = eigenpairs(_matrix(np.arange(8.0)), 8, block=3)
    torch.testing.assert_close(whole.values, torch.arange(7.0, -1, -1).double(), rtol=1e-9, atol=1e-9)
    zero = eigenpairs(Matrix(torch.zeros(5, 5)), 2)
    assert bool(zero.converged.all())
    assert float(zero.values.abs().max()) == 0
    with pytest.raises(UsageError):
        eigenpairs(operator, 65)


def test_density_is_close_to_the_exact_one():
    values = np.concatenate([np.random.default_rng(0).normal(size=290) * 0.3, np.linspace(2, 4, 10)])
    found = spectral_density(_matrix(values), probes=30, steps=60, width=0.05)
    exact = exact_density(torch.tensor(values), found.grid, found.width)
    step = float(found.grid[1] - found.grid[0])
    assert float((found.values - exact).abs().sum()) * step < 0.05
    assert float(found.values.sum()) * step == pytest.approx(1, abs=1e-3)
    assert found.share_below(1.5) == pytest.approx(290 / 300, abs=0.01)
    identity = spectral_density(_matrix(np.ones(20)), probes=2)
    assert identity.share_below(1.5) == pytest.approx(1)


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_trace_intervals_cover(method):
    values = np.concatenate([np.random.default_rng(0).normal(size=190), np.linspace(20, 60, 10)])
    operator = _matrix(values)
    found = [trace(operator, products=45, method=method, seed=seed) for seed in range(60)]
    covered = sum(t.low <= values.sum() <= t.high for t in found)
    assert covered >= 52
    assert all(t.products == 45 for t in found)


def test_hutch_plus_plus_is_narrower_on_a_decaying_spectrum_and_exact_at_full_rank():
    operator = _matrix(2.0 ** -np.arange(100))
    plain, better = (trace(operator, products=45, method=method) for method in ("hutchinson", "hutch++"))
    assert better.high - better.low < 0.01 * (plain.high - plain.low)
    small = trace(_matrix([1.0, 2, 3]), products=9)
    assert small.value == pytest.approx(6)
    with pytest.raises(UsageError):
        trace(operator, products=3)
