"""Stability of SGD against the Kronecker matrix, simulated steps, and dense Hessians of every sample."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from nervure import zoo
from nervure._kit import BadData, OverBudget, UsageError
from nervure.core.forward import take, tree_map
from nervure.core.lanczos import eigenpairs
from nervure.core.operators import gauss_newton
from nervure.inspect import Curvatures, sgd_stability
from nervure.inspect._stability_trial import problem


def _radius(hessians, rate, batch):
    """The spectral radius of the mean square step, over the directions that are curved at all."""
    n = len(hessians)
    mean = hessians.mean(0)
    values, vectors = torch.linalg.eigh(mean)
    basis = vectors[:, values > 1e-9 * values[-1]]
    small = basis.T @ hessians @ basis
    eye = torch.eye(basis.shape[1], dtype=torch.float64)
    step = eye - rate * small.mean(0)
    noise = sum(torch.kron(one, one) for one in small) * rate**2 / batch * (1 - batch / n) / n
    return float(torch.linalg.eigvals(torch.kron(step, step) + noise).abs().max())


def test_critical_rate_and_bounds_against_the_kronecker_matrix():
    draw = torch.Generator().manual_seed(0)
    for trial in range(30):
        hessians, batch, _ = problem(draw)
        if trial % 2:  # of full rank too
            hessians = hessians + hessians.flip(0)
        found = Curvatures.of(hessians)
        low, high = 0.0, 10 / found.sharpness
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if _radius(hessians, middle, batch) < 1 else (low, middle)
        critical = found.critical_rate(batch)
        assert critical == pytest.approx(low, rel=1e-5)
        assert found.stable_below(batch) <= critical * (1 + 1e-6)
        assert found.unstable_above(batch) >= critical * (1 - 1e-6)
        whole = found.samples
        assert found.critical_rate(whole) == pytest.approx(2 / found.sharpness, rel=1e-6)
        assert found.stable_below(whole) == pytest.approx(found.unstable_above(whole))


def test_coherence_from_its_definition():
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(5, 2, 4, generator=draw, dtype=torch.float64)
    hessians = rows.mT @ rows

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T

    S = torch.stack([torch.stack([(root(a) @ root(b)).norm() for b in hessians]) for a in hessians])
    sharpest = max(float(torch.linalg.eigvalsh(one)[-1]) for one in hessians)
    found = Curvatures.of(hessians)
    assert found.coherence == pytest.approx(float(torch.linalg.eigvalsh(S)[-1]) / sharpest)
    assert found.sample_sharpness == pytest.approx(sharpest)
    assert found.sharpness == pytest.approx(float(torch.linalg.eigvalsh(hessians.mean(0))[-1]))


def test_simulated_steps_grow_as_the_critical_rate_says():
    draw = torch.Generator().manual_seed(2)
    rows = torch.randn(6, 3, generator=draw, dtype=torch.float64)
    hessians = rows.unsqueeze(2) * rows.unsqueeze(1)
    critical = Curvatures.of(hessians).critical_rate(2)
    for factor in (0.8, 1.2):
        rate = factor * critical
        # Second moments over many runs, a few steps at a time: the mean square itself has heavy tails.
        start = torch.randn(200_000, 3, generator=draw, dtype=torch.float64)
        chosen = (torch.rand(200_000, 6, generator=draw) < 2 / 6).double()
        after = start - rate / 2 * (chosen * (start @ rows.T)) @ rows
        moment = after.T @ after / len(after)
        mean = hessians.mean(0)
        step = torch.eye(3).double() - rate * mean
        expected = step @ step + rate**2 / 2 * (1 - 2 / 6) / 6 * (hessians @ hessians).sum(0)
        assert float((moment - expected).norm() / expected.norm()) < 0.03
        assert (_radius(hessians, rate, 2) < 1) == (factor < 1)


def _dense(model, x, y, loss):
    names = dict(model.named_parameters())
    sizes = [value.numel() for value in names.values()]

    def one(flat, inputs, target):
        parts = flat.split(sizes)
        values = {name: part.view_as(value) for part, (name, value) in zip(parts, names.items(), strict=True)}
        return loss(functional_call(model, values, inputs[None]), target[None])

    flat = torch.cat([value.detach().flatten() for value in names.values()])
    pairs = zip(x, y, strict=True)
    return torch.stack([hessian(lambda v, a=a, b=b: one(v, a, b), flat) for a, b in pairs])


@pytest.mark.parametrize("batches", [1, 2])
def test_a_network_at_its_minimum_against_dense_hessians_of_every_sample(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(6, 3).double()
    y = model(x).detach()
    truth = Curvatures.of(_dense(model, x, y, F.mse_loss))
    data = (x, y) if batches == 1 else [(x[:4], y[:4]), (x[4:], y[4:])]
    found = sgd_stability(model, data, loss=F.mse_loss, learning_rate=0.01, batch_size=2)
    for name in ("sharpness", "sample_sharpness", "coherence", "rank"):
        assert getattr(found.curvatures, name) == pytest.approx(getattr(truth, name), rel=1e-6)
    assert found.critical == pytest.approx(truth.critical_rate(2), rel=1e-4)
    assert found.fitted
    assert found.verdict == "ok"
    rates = (found.critical * 1.01, found.critical * 0.99)
    judged = [sgd_stability(model, data, loss=F.mse_loss, learning_rate=r, batch_size=2).verdict for r in rates]
    assert judged == ["warn", "ok"]
    # Without the exact rate only the bounds speak.
    between = sgd_stability(model, data, loss=F.mse_loss, learning_rate=found.critical, batch_size=2, exact_below=0)
    assert between.critical is None
    assert between.verdict == "cannot tell"


@pytest.mark.parametrize("name", ["mlp", "residual-conv", "lstm", "twice-used"])
def test_cross_entropy_on_the_zoo_against_gauss_newton(name):
    case = zoo.case(name)
    model = case.model(seed=0).eval().double()
    inputs, targets = case.batch(3, seed=0)
    batch = (tree_map(lambda v: v.double() if v.is_floating_point() else v, inputs), targets)

    def loss(output, target):
        return F.cross_entropy(output.flatten(0, -2), target.flatten())

    found = sgd_stability(model, batch, loss=loss, exact_below=0).curvatures
    whole = eigenpairs(gauss_newton(model, batch, loss), 1, which="largest", tolerance=1e-8)
    assert found.sharpness == pytest.approx(float(whole.values[0]), rel=1e-6)
    alone = [(take(batch[0], slice(n, n + 1)), targets[n : n + 1]) for n in range(3)]
    tops = [float(eigenpairs(gauss_newton(model, one, loss), 1, which="largest", tolerance=1e-8).values[0])
            for one in alone]  # fmt: skip
    assert found.sample_sharpness == pytest.approx(max(tops), rel=1e-6)


def test_off_a_minimum_there_is_no_verdict():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    found = sgd_stability(model, (torch.randn(9, 3), 30 * torch.randn(9, 1)), loss=F.mse_loss, learning_rate=0.1)
    assert not found.fitted
    assert found.verdict == "cannot tell"


def test_refusals():
    model, x = nn.Linear(3, 2), torch.randn(6, 3)
    y = torch.zeros(6, dtype=torch.long)
    with pytest.raises(UsageError, match="a batch of 1 to 6"):
        sgd_stability(model, (x, y), batch_size=7)
    with pytest.raises(OverBudget, match="at most 5 rows"):
        sgd_stability(model, (x, y), most=5)
    with pytest.raises(BadData, match="not convex"):
        sgd_stability(model, (x, y), loss=lambda output, target: -output.square().sum())
    flat = sgd_stability(model, (x, y), loss=lambda output, target: output.sum(), learning_rate=0.1).curvatures
    assert flat.rank == 0
    assert flat.critical_rate(2) == math.inf
