"""Bits against counted shares, an exact inversion and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chi2, ncx2

from nervure._kit import BadData, UsageError
from nervure.inspect._bias_trial import interpolant_errors, network_errors, posterior
from nervure.inspect.exact_inductive_bias import _log_cdf, _log_density, hypothesis_bits, needed_bits


def _imhof(error, shift, root):
    """P(mean |shift + root z|^2 <= error) by Imhof's inversion of the characteristic function."""
    u, s, _ = torch.linalg.svd(root, full_matrices=False)
    weights = (s.square() / len(shift)).numpy()
    along = (u.T @ shift).numpy()
    rest = float((shift.square().sum() - (u.T @ shift).square().sum()).clamp_min(0)) / len(shift)
    keep = weights > 1e-12 * weights.max()
    rest += float((along[~keep] ** 2).sum()) / len(shift)
    lam, far = weights[keep], along[keep] ** 2 / len(shift) / weights[keep]
    x = error - rest
    if x <= 0:
        return 0.0

    def integrand(t):
        angle = 0.5 * np.sum(np.arctan(lam * t) + far * lam * t / (1 + (lam * t) ** 2)) - 0.5 * x * t
        size = np.prod((1 + (lam * t) ** 2) ** 0.25) * np.exp(0.5 * np.sum(far * (lam * t) ** 2 / (1 + (lam * t) ** 2)))
        return np.sin(angle) / (t * size)

    top = 60 / lam.max() * 50
    ends = np.geomspace(1e-9, top, 30)
    value = sum(quad(integrand, a, b, limit=400)[0] for a, b in itertools.pairwise(ends))
    return 0.5 - value / math.pi


def test_the_exact_chance_of_a_gaussian_process_is_met():
    draw = torch.Generator().manual_seed(0)
    shift, root = posterior(2, draw)
    z = torch.randn(20000, root.shape[1], generator=draw, dtype=torch.float64)
    errors = (shift + z @ root.T).square().mean(1)
    for share in (0.5, 0.1, 0.02):
        error = float(errors.quantile(share))
        exact = _imhof(error, shift, root)
        assert exact == pytest.approx(share, rel=0.12)
        found = needed_bits(errors, error, resamples=4)
        assert found.counted == pytest.approx(-math.log2(share), abs=0.02)
        assert found.bits == pytest.approx(-math.log2(exact), abs=0.35)


def test_a_chi_squared_law_is_found_again():
    draw = torch.Generator().manual_seed(1)
    errors = torch.randn(4000, 8, generator=draw, dtype=torch.float64).square().sum(1) * 0.3
    found = needed_bits(errors, 0.3 * 0.5, resamples=20)
    truth = -math.log2(chi2.cdf(0.5, 8))
    assert found.bits == pytest.approx(truth, rel=0.1)
    assert found.low < found.bits < found.high
    assert found.extrapolated == pytest.approx(found.bits - math.log2(4000))
    assert needed_bits(errors, float(errors.median()), resamples=2).bits == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("law", [(6.0, 3.0, 1.0), (40.0, 25.0, 0.1), (3.5, 0.01, 2.0)])
def test_the_tail_continues_the_distribution_function(law):
    k, far, s = law
    for error in (0.3 * s * (k + far), 0.05 * s * k):
        assert _log_cdf(error, law) == pytest.approx(float(np.log(ncx2.cdf(error / s, k, far))), rel=1e-6)
    # Far down the leading term is (x / 2)^(k / 2) exp(-far / 2) / Gamma(k / 2 + 1).
    x = 1e-12
    leading = k / 2 * math.log(x / 2) - far / 2 - math.lgamma(k / 2 + 1)
    assert _log_cdf(x * s, law) == pytest.approx(leading, rel=1e-6)


@pytest.mark.parametrize("law", [(1.0, 0.1), (6.0, 3.0), (40.0, 25.0), (300.0, 900.0), (60.0, 2.0)])
def test_the_density_is_scipys(law):
    k, far = law
    x = np.linspace(0.2, 2, 9) * (k + far)
    np.testing.assert_allclose(_log_density(x, k, far), ncx2.logpdf(x, k, far), rtol=1e-5, atol=1e-4)


def test_verdicts_and_bad_input():
    draw = torch.Generator().manual_seed(2)
    errors = torch.rand(200, generator=draw) + 0.5
    assert needed_bits(errors, 1.0, resamples=5).verdict == "ok"
    assert needed_bits(errors, 1e-3, resamples=5).verdict == "warn"
    with pytest.raises(BadData, match="no law"):
        needed_bits(errors[:5], 1.0)
    with pytest.raises(BadData, match="no law"):
        needed_bits(-errors, 1.0)
    with pytest.raises(UsageError, match="not above 0"):
        needed_bits(errors, 0.0)


def test_hypotheses_of_ones_own():
    seen = []

    def sample(seed):
        seen.append(seed)
        return float(torch.rand(1, generator=torch.Generator().manual_seed(seed)) + 0.1)

    found = hypothesis_bits(sample, 0.6, draws=30, seed=5)
    assert seen == list(range(5, 35))
    assert found.draws == 30
    assert 0.3 < found.bits < 3


def test_interpolants_interpolate_and_networks_fit():
    draw = torch.Generator().manual_seed(0)
    assert float(interpolant_errors(1, 50, draw).mean()) < 1e-3
    assert float(interpolant_errors(4, 50, torch.Generator().manual_seed(0)).mean()) > 0.02
    errors = network_errors(1, 4, torch.Generator().manual_seed(0), steps=300)
    assert errors.shape == (4,)
    assert float(errors.median()) < 0.1
