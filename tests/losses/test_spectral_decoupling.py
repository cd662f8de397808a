"""Spectral decoupling against differential equations, roots in one dimension, and loops over samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import brentq
from torch.nn import functional as F

from nervure._kit import UsageError
from nervure.losses import SpectralDecoupling, decoupled_loss


def _sigmoid(z):
    return 1 / (1 + np.exp(-z))


def test_linear_dynamics_follow_the_differential_equation():
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 9, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 2, 0.5, 1, 1, 3]).view(-1, 1)
    target, strength, offset, rate, steps = torch.tensor([0, 1, 1, 0, 1, 0]), 0.3, 0.4, 1e-3, 4000
    w = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(decoupled_loss(rows @ w, target, strength=strength, offset=offset), w)
        with torch.no_grad():
            w -= rate * gradient
    kernel, sign = (rows @ rows.T).numpy(), 2 * target.numpy() - 1

    def flow(_, f):
        return -kernel @ (-sign * _sigmoid(-sign * f) + strength * (f - offset)) / 6

    truth = solve_ivp(flow, (0, rate * steps), np.zeros(6), rtol=1e-10, atol=1e-12).y[:, -1]
    assert np.abs((rows @ w).detach().numpy() - truth).max() < 2e-3 * np.abs(truth).max()


@pytest.mark.parametrize("strength", [0.05, 0.3, 2.0])
def test_the_fixed_point_does_not_depend_on_how_strong_a_feature_is(strength):
    strengths = torch.tensor([3.0, 1.0, 0.4], dtype=torch.float64)
    rows, target = torch.diag(strengths), torch.ones(3, dtype=torch.long)
    root = brentq(lambda f: _sigmoid(-f) - strength * f, 0, 50)
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    decayed = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    free = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)
    held = torch.optim.LBFGS([decayed], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)

    def penalised():
        free.zero_grad()
        loss = decoupled_loss(rows @ w, target, strength=strength)
        loss.backward()
        return loss

    def with_decay():
        held.zero_grad()
        loss = decoupled_loss(rows @ decayed, target, strength=0.0) + strength / 6 * decayed.square().sum()
        loss.backward()
        return loss

    free.step(penalised)
    held.step(with_decay)
    assert (rows @ w).detach().numpy() == pytest.approx(root, abs=1e-4)
    # Under weight decay each direction ends at s^2 sigmoid(-f) = strength f: weak features stay weak.
    ends = [brentq(lambda f, s=s: s * s * _sigmoid(-f) - strength * f, 0, 50) for s in strengths.tolist()]
    assert (rows @ decayed).detach().numpy() == pytest.approx(np.array(ends), abs=1e-4)


def test_one_logit_against_a_loop():
    f = torch.tensor([0.5, -2.0, 3.0, 1.0], dtype=torch.float64)
    y, strength, offset = [1, 0, 0, 1], [0.3, 0.7], [-1.0, 2.0]
    losses = [np.log(1 + np.exp(-(2 * c - 1) * v)) for v, c in zip(f.tolist(), y, strict=True)]
    squares = [strength[c] / 2 * (v - offset[c]) ** 2 for v, c in zip(f.tolist(), y, strict=True)]
    options = {"strength": torch.tensor(strength), "offset": torch.tensor(offset)}
    found = decoupled_loss(f, torch.tensor(y), **options)
    assert float(found) == pytest.approx(np.mean(losses) + np.mean(squares), rel=1e-6)
    assert float(decoupled_loss(f.view(-1, 1), torch.tensor(y), **options)) == pytest.approx(float(found))
    assert float(SpectralDecoupling(**options)(f, torch.tensor(y))) == pytest.approx(float(found))


def test_class_scores_masks_and_layouts():
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(5, 4, 3, generator=draw, dtype=torch.float64)
    target = torch.randint(3, (5, 4), generator=draw)
    target[0, 1] = target[3, 3] = -100
    weight, offset = torch.tensor([1.0, 2, 3], dtype=torch.float64), torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    strength = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    terms, squares, shares = [], [], []
    for row, label in zip(scores.view(-1, 3), target.view(-1), strict=True):
        if label < 0:
            continue
        terms.append(-weight[label] * row.log_softmax(0)[label])
        shares.append(weight[label])
        squares.append(strength[label] / 2 * sum((row[c] - offset[c]) ** 2 for c in range(3)) / 3)
    truth = float(sum(terms) / sum(shares) + sum(squares) / len(squares))
    options = {"strength": strength, "offset": offset, "weight": weight}
    assert float(decoupled_loss(scores, target, dim=-1, **options)) == pytest.approx(truth, rel=1e-12)
    assert float(decoupled_loss(scores.movedim(-1, 1), target, **options)) == pytest.approx(truth, rel=1e-12)
    assert float(SpectralDecoupling(dim=-1, **options)(scores, target)) == pytest.approx(truth, rel=1e-12)
    plain = F.cross_entropy(scores.movedim(-1, 1), target, weight=weight)
    assert float(decoupled_loss(scores.movedim(-1, 1), target, weight=weight, strength=0)) == pytest.approx(
        float(plain)
    )


def test_half_precision_is_computed_in_float32():
    scores, target = torch.randn(6, 4), torch.arange(6) % 4
    half = decoupled_loss(scores.bfloat16(), target)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(decoupled_loss(scores.bfloat16().float(), target)))


def test_what_does_not_fit():
    with pytest.raises(UsageError, match="do not fit"):
        decoupled_loss(torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(UsageError, match="classes"):
        decoupled_loss(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(UsageError, match="classes"):
        decoupled_loss(torch.zeros(2, 3), torch.tensor([-100, -100]))
    with pytest.raises(UsageError, match="negative"):
        decoupled_loss(torch.zeros(2, 3), torch.tensor([0, 1]), strength=-1.0)
    with pytest.raises(UsageError, match="strength does not fit"):
        decoupled_loss(torch.zeros(2, 3), torch.tensor([0, 1]), strength=torch.ones(2))
