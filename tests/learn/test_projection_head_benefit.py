"""Contrastive optima in closed form, balance along gradient descent, probes against features taken by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifierCV
from sklearn.preprocessing import StandardScaler
from torch import nn

from nervure._kit import BadData, Unsupported, UsageError
from nervure.core.readout import PENALTIES
from nervure.data import load
from nervure.learn._head_trial import NOISE, WIDTH, LinearPair, augmented, coarse, feature_world, trained
from nervure.learn.projection_head_benefit import (
    Depth,
    DepthReport,
    FixedReweight,
    imbalance,
    layer_slopes,
    probe_depths,
    spectral_contrastive,
)
from nervure.testing.checks import untouched


def rotation(size, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64)).Q


def test_the_loss_is_that_of_loops_over_pairs():
    f, g = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    same = sum(float(f[i] @ g[i]) for i in range(6)) / 6
    other = sum(float(f[i] @ g[j]) ** 2 for i in range(6) for j in range(6) if i != j) / 30
    assert spectral_contrastive(f, g).item() == pytest.approx(-2 * same + other, abs=1e-12)


@pytest.mark.parametrize("width", [5, 2])
def test_descent_on_the_population_loss_reaches_the_closed_form(width):
    # -2 tr(W C W') + |W S W'|^2 has W'W = S^-1/2 [S^-1/2 C S^-1/2]_r S^-1/2: the top eigenspace of the averaged views.
    turn, back = rotation(5, 0), rotation(5, 1)
    cross = turn @ torch.diag(torch.tensor([2.0, 1.5, 1.0, 0.6, 0.3], dtype=torch.float64)) @ turn.T
    whole = cross + back @ torch.diag(torch.tensor([0.1, 0.4, 0.5, 1.0, 2.0], dtype=torch.float64)) @ back.T
    values, vectors = torch.linalg.eigh(whole)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    values, vectors = torch.linalg.eigh(root @ cross @ root)
    kept = values.clone()
    kept[: 5 - width] = 0
    right = root @ vectors @ torch.diag(kept) @ vectors.T @ root
    layers = [0.3 * rotation(5, 2), 0.3 * rotation(5, 3)[:width]]
    for weight in layers:
        weight.requires_grad_()
    for _ in range(1500):
        found = layers[1] @ layers[0]
        loss = -2 * (found @ cross @ found.T).trace() + (found @ whole @ found.T).square().sum()
        for weight, slope in zip(layers, torch.autograd.grad(loss, layers), strict=True):
            weight.data -= 0.025 * slope
    found = (layers[1] @ layers[0]).detach()
    torch.testing.assert_close(found.T @ found, right, rtol=0, atol=1e-6)
    # The loss of a large sample is that of the population.
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 5, generator=draw, dtype=torch.float64) @ torch.linalg.cholesky(cross).T
    one, two = (
        x + torch.randn(4000, 5, generator=draw, dtype=torch.float64) @ torch.linalg.cholesky(whole - cross).T
        for _ in range(2)
    )
    sampled = spectral_contrastive(one @ found.T, two @ found.T)
    assert sampled.item() == pytest.approx(loss.item(), rel=0.05)


def test_balance_drifts_half_as_much_at_half_the_rate():
    x, target = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 6, dtype=torch.float64)
    drifts = []
    for rate in (0.02, 0.01):
        layers = [0.5 * rotation(6, 4), 0.5 * rotation(6, 5)]
        before = layers[1].T @ layers[1] - layers[0] @ layers[0].T
        for weight in layers:
            weight.requires_grad_()
        for _ in range(round(4 / rate)):
            loss = spectral_contrastive(x @ layers[0].T @ layers[1].T, (x + 0.3 * target) @ layers[0].T @ layers[1].T)
            for weight, slope in zip(layers, torch.autograd.grad(loss, layers), strict=True):
                weight.data -= rate * slope
        after = (layers[1].T @ layers[1] - layers[0] @ layers[0].T).detach()
        drifts.append(float((after - before).norm()))
        assert (layers[0].detach() - 0.5 * rotation(6, 4)).norm() > 0.1
        scale = (layers[1].T @ layers[1]).norm() + (layers[0] @ layers[0].T).norm()
        assert imbalance(layers).item() == pytest.approx(after.norm().item() / scale.item())
    assert drifts[0] / drifts[1] == pytest.approx(2, abs=0.1)


def test_slopes_of_balanced_chains_are_depth_over_layers():
    values = torch.tensor([5.0, 2.0, 0.5, 0.1], dtype=torch.float64)
    bases = [rotation(4, seed) for seed in range(4)]
    for count in (2, 3):
        chain = [bases[k + 1] @ torch.diag(values ** (1 / count)) @ bases[k].T for k in range(count)]
        torch.testing.assert_close(layer_slopes(chain, rank=4), torch.arange(1, count + 1).double() / count)
        assert imbalance(chain).max() < 1e-12
    tall = [3 * rotation(4, 9), chain[0]]
    assert layer_slopes(tall, rank=3)[0].abs() < 1e-12


def test_the_claims_networks_reach_the_optimum_of_their_world():
    x, signs = feature_world(4000, torch.Generator().manual_seed(0))
    assert torch.equal(x[:, :3] > 0, signs == 1)
    noise = (augmented(x, torch.Generator().manual_seed(1)) - x).var(0)
    torch.testing.assert_close(noise, torch.tensor([*NOISE, *[1.0] * 5]), rtol=0.1, atol=0)
    pairs = [LinearPair(gain=gain, draw=torch.Generator().manual_seed(0)) for gain in (None, 3.0)]
    assert imbalance([pairs[0].encoder.weight, pairs[0].head.weight]).item() < 1e-6
    assert imbalance([pairs[1].encoder.weight, pairs[1].head.weight]).item() > 0.9
    trained(pairs[0], spectral_contrastive, steps=800, draw=torch.Generator().manual_seed(2))
    whole = (pairs[0].head.weight @ pairs[0].encoder.weight).detach()
    right = [1 / (1 + variance) for variance in NOISE[:2]]
    np.testing.assert_allclose(torch.linalg.svdvals(whole)[:2], right, rtol=0.1)
    assert whole.shape == (16, WIDTH)


def test_probes_are_those_on_features_taken_by_hand():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(64, 5))
    x = torch.randn(240, 1, 6, 6)
    y = (x[:, 0, :, 0].mean(1) > 0).long() + (x[:, 0, 0].mean(1) > 0).long()
    with untouched(net):
        found = probe_depths(net, (x, y), seed=3)
        pooled = probe_depths(net, (x, y), seed=3, widest=10).layers["0"]
        halves = probe_depths(net, [(x[:100], y[:100]), (x[100:], y[100:])], seed=3)
    assert list(found.layers) == ["0", "1", "5"]
    assert halves == found
    net.eval()
    order = torch.randperm(240, generator=torch.Generator().manual_seed(3))
    fit, score = order[:120], order[120:]
    right = {}
    with torch.no_grad():
        taken = {"0": net[0](x), "1": net[:2](x), "5": net(x), "pooled": net[0](x).mean((2, 3))}
    for name, value in taken.items():
        rows = value.flatten(1).double().numpy()
        scaler = StandardScaler().fit(rows[fit])
        probe = RidgeClassifierCV(alphas=PENALTIES).fit(scaler.transform(rows[fit]), y[fit])
        right[name] = probe.predict(scaler.transform(rows[score])) == y[score].numpy()
        depth = pooled if name == "pooled" else found.layers[name]
        assert depth.accuracy == pytest.approx(right[name].mean())
        variances = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
        assert depth.directions == pytest.approx(variances.sum() ** 2 / (variances**2).sum())
    gains = right["0"].astype(float) - right["5"]
    assert found.layers["0"].gain == pytest.approx(gains.mean())
    assert found.layers["0"].error == pytest.approx(gains.std(ddof=1) / math.sqrt(120))
    assert found.layers["5"].gain == found.layers["5"].error == 0
    assert found.scored == 120


def test_positions_with_labels_are_samples():
    net = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3))
    tokens = torch.randint(7, (20, 6))
    found = probe_depths(net, (tokens, tokens % 2))
    flat = probe_depths(net, (tokens.flatten(), tokens.flatten() % 2))
    assert found == flat
    assert found.scored == 60


def test_verdicts():
    def report(gain, error, scored=500):
        return DepthReport({"a": Depth(0.5, 1.0, gain, error), "b": Depth(0.4, 1.0, 0.0, 0.0)}, scored)

    assert report(0.1, 0.02).verdict == "warn"
    assert report(0.0, 0.01).verdict == "ok"
    assert report(0.03, 0.02).verdict == "cannot tell"
    assert report(0.1, 0.02, scored=99).verdict == "cannot tell"
    assert report(0.1, 0.02).best == "a"
    x = torch.randn(600, 6)
    blind = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1))
    with torch.no_grad():
        blind[0].weight.copy_(torch.eye(6))
        blind[1].weight.copy_(torch.eye(6)[:1])
    assert probe_depths(blind, (x, (x[:, 1] > 0).long())).verdict == "warn"
    assert probe_depths(blind, (x, (x[:, 0] > 0).long())).verdict == "ok"
    assert probe_depths(blind, (x, torch.randint(2, (600,))), layers=["1"]).verdict == "cannot tell"


def test_a_fixed_head_weighs_and_has_nothing_to_learn():
    head = FixedReweight(5, smallest=1e-4)
    torch.testing.assert_close(head(torch.ones(2, 5))[1], 10.0 ** -torch.arange(5))
    assert not list(head.parameters())
    assert "weights" in head.state_dict()
    x = torch.ones(5, requires_grad=True)
    head(x).sum().backward()
    assert torch.equal(x.grad, head.weights)
    assert torch.equal(FixedReweight(1)(x), x)
    assert torch.equal(FixedReweight(5, smallest=1.0)(x), x)
    for smallest in (0.0, 2.0):
        with pytest.raises(UsageError, match="no such weight"):
            FixedReweight(5, smallest=smallest)


def test_errors_and_coarse_labels():
    x, y = torch.randn(8, 4), torch.arange(8) % 2
    with pytest.raises(BadData, match="too few"):
        probe_depths(nn.Linear(4, 2), (x[:3], y[:3]))
    with pytest.raises(Unsupported, match="no layer"):
        probe_depths(nn.Linear(4, 2), (x, y), layers=[])
    data = load("digits", test=300)
    two = coarse(data)
    assert two.classes == 2
    assert torch.equal(two.train_y, (data.train_y >= 5).long())
    assert torch.equal(two.test_x, data.test_x)
