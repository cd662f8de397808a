"""Collapse against full covariances and numpy's pseudo-inverse; the closed form against a grid and whole solutions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from nervure import zoo
from nervure._kit import BadData, Unsupported, UsageError
from nervure.core import features as feats
from nervure.core import heads
from nervure.inspect import neural_collapse, predicted_geometry
from nervure.inspect._collapse_trial import free_features, imbalanced
from nervure.inspect._frames import mean_cosine, simplex_distance


def _brute(x, y, decisions, weight=None):
    """Every number with full covariances, shape (F, F)."""
    x, y, decisions = x.double().numpy(), y.numpy(), decisions.numpy()
    labels = np.unique(y)
    means = np.stack([x[y == c].mean(0) for c in labels])
    within = sum(np.outer(row, row) for c, mean in zip(labels, means, strict=True) for row in x[y == c] - mean) / len(x)
    centred = means - means.mean(0)
    between = centred.T @ centred / len(labels)
    gram = centred @ centred.T
    simplex = np.eye(len(labels)) - 1 / len(labels)
    rows = means / np.linalg.norm(means, axis=1, keepdims=True)
    off = (rows @ rows.T)[~np.eye(len(labels), dtype=bool)]
    nearest = labels[((x[:, None] - means) ** 2).sum(2).argmin(1)]
    found = {
        "variability": np.trace(within @ np.linalg.pinv(between, rcond=1e-9)) / len(labels),
        "simplex": np.linalg.norm(gram / np.linalg.norm(gram) - simplex / np.linalg.norm(simplex)),
        "orthogonality": np.sqrt((off**2).mean()),
        "disagreement": (nearest != decisions).mean(),
    }
    if weight is not None:
        w = weight.double().numpy()
        scaled = np.zeros_like(w)
        scaled[labels] = centred / np.linalg.norm(centred)
        found["duality"] = ((w / np.linalg.norm(w) - scaled) ** 2).sum()
    return found


@pytest.mark.parametrize("width", [4, 70])  # narrower and wider than the span of all groups' class means
def test_every_number_by_brute_force(width):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 5)).double()
    x, y = torch.randn(150, 6).double(), torch.randint(5, (150,))
    found = neural_collapse(model, [(x[:90], y[:90]), (x[90:], y[90:])]).layers["features"]
    seen = heads.head(model, x, method="test")
    for name, value in _brute(seen.features, y, seen.scores.argmax(1), seen.weight).items():
        assert getattr(found, name).value == pytest.approx(value, rel=1e-8), name
    assert found.fewest == int(y.bincount().min())
    named = neural_collapse(model, (x, y), layers=["0", "1"])
    assert list(named.layers) == ["0", "1"]
    assert named.layers["0"].duality is None
    assert named.layers["1"].variability.value == pytest.approx(found.variability.value, rel=1e-9)
    truth = _brute(feats.samples(feats.features(model, x, ["0"])["0"]), y, seen.scores.argmax(1))
    assert named.layers["0"].variability.value == pytest.approx(truth["variability"], rel=1e-8)


def test_the_errors_are_those_of_leaving_groups_out():
    torch.manual_seed(1)
    model, x, y = nn.Linear(8, 3).double(), torch.randn(60, 8).double(), torch.arange(3).repeat(20)
    found = neural_collapse(model, (x, y), groups=4).layers["features"]
    # Sample i has class i % 3 and is dealt to group (i // 3 + i % 3) % 4.
    group = (torch.arange(60) // 3 + torch.arange(60) % 3) % 4
    left = [_brute(x[group != g], y[group != g], y[group != g])["variability"] for g in range(4)]
    assert found.variability.error == pytest.approx(math.sqrt(3 * np.var(left)), rel=1e-8)


def test_collapsed_features_have_collapsed_numbers():
    eye = torch.eye(4).double()
    y = torch.arange(4).repeat(20)
    model = nn.Linear(4, 4, bias=False).double()
    model.weight.data.copy_(eye - 0.25)
    found = neural_collapse(model, (eye.repeat(20, 1), y))
    layer = found.layers["features"]
    for number in (layer.variability, layer.simplex, layer.orthogonality, layer.duality, layer.disagreement):
        assert number.value == pytest.approx(0, abs=1e-9)
    assert found.verdict == "ok"
    assert layer.lost == ()


def test_lost_classes_are_named():
    torch.manual_seed(2)
    centres = torch.eye(4).double() * 5
    centres[3] = centres[2] * 0.99
    y = torch.arange(4).repeat(30)
    x = centres[y] + 0.01 * torch.randn(120, 4).double()
    found = neural_collapse(nn.Linear(4, 4).double(), (x, y))
    assert found.layers["features"].lost == (2, 3)
    assert found.verdict == "warn"
    few = neural_collapse(nn.Linear(4, 4).double(), (x[:20], y[:20]))
    assert few.verdict == "cannot tell"
    alike = neural_collapse(nn.Linear(4, 4).double(), (torch.ones(40, 4).double(), y[:40]))
    assert alike.layers["features"].variability.value == math.inf
    assert alike.verdict == "cannot tell"


def test_frames():
    simplex = torch.eye(5).double() - 0.2
    assert simplex_distance(3 * simplex) == pytest.approx(0, abs=1e-12)
    assert simplex_distance(torch.zeros(3, 3)) == 2
    assert mean_cosine(torch.eye(3) * torch.tensor([1.0, 2, 5])) == 0
    assert mean_cosine(torch.ones(3, 2)) == pytest.approx(1)


def test_convolutions_positions_and_refusals():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    x, y = torch.randn(40, 1, 6, 6), torch.randint(3, (40,))
    seen = feats.samples(feats.features(model, x, ["0"])["0"])
    found = neural_collapse(model, (x, y), layers=["0"]).layers["0"]
    assert found.variability.value == pytest.approx(_brute(seen, y, model(x).argmax(1))["variability"], rel=1e-5)
    tied = zoo.case("tied-lm")
    tokens = neural_collapse(tied.model(seed=0), tied.batch(6, seed=0)).layers["features"]
    assert math.isfinite(tokens.variability.value)
    with pytest.raises(BadData, match="no class numbers"):
        neural_collapse(nn.Linear(3, 2), (torch.randn(4, 3), torch.randn(4, 2)))
    with pytest.raises(BadData, match="one class alone"):
        neural_collapse(nn.Linear(3, 2), (torch.randn(4, 3), torch.zeros(4, dtype=torch.long)))
    with pytest.raises(BadData, match="no class weight"):
        neural_collapse(nn.Linear(3, 2), (torch.randn(4, 3), torch.arange(4)))
    with pytest.raises(Unsupported, match="rows of features"):
        neural_collapse(nn.Linear(3, 2), (torch.randn(4, 3), torch.arange(2)))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("decay", [1e-4, 5e-3, 0.015, 0.05])
def test_the_scalar_problem_on_a_grid(depth, decay):
    counts = [80, 40, 20, 10]
    found = predicted_geometry(counts, weight_decays=[decay] * depth, feature_decay=2 * decay)
    s = np.linspace(0, 1, 400_001)
    for n, output in zip(counts, found.outputs.tolist(), strict=True):
        penalty = (depth + 1) / 2 * (decay**depth * 2 * decay * n * s**2) ** (1 / (depth + 1))
        cost = n / 300 * (s - 1) ** 2 + penalty
        assert output == pytest.approx(s[cost.argmin()], abs=5e-6)
    whole = found.singular_values.prod(0) * found.feature_lengths
    torch.testing.assert_close(whole, found.outputs)


@pytest.mark.parametrize("bad", [([], [1.0], 1.0), ([3], [], 1.0), ([3], [0.0], 1.0), ([3], [1.0], 0.0)])
def test_no_such_problem(bad):
    with pytest.raises(UsageError, match="no such problem"):
        predicted_geometry(bad[0], weight_decays=bad[1], feature_decay=bad[2])


def test_the_whole_problem_reaches_the_closed_form():
    counts, rates = (12, 6, 3), ((0.02, 0.01), 0.02)
    found = free_features(counts, torch.Generator().manual_seed(0), weight_decays=rates[0], feature_decay=rates[1])
    truth = predicted_geometry(counts, weight_decays=rates[0], feature_decay=rates[1])
    torch.testing.assert_close(found.outputs, truth.outputs, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.means.norm(dim=1), truth.feature_lengths, atol=1e-4, rtol=0)
    assert mean_cosine(found.means) < 1e-4


def test_imbalanced_numbers_fall():
    y = torch.arange(10).repeat(100)
    counts = y[imbalanced(y, most=100, least=10)].bincount().tolist()
    assert (counts[0], counts[-1]) == (100, 10)
    assert counts == sorted(counts, reverse=True)
