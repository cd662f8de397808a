"""The variance ratio against Gaussians in closed form and two passes; episodes against Gaussian error rates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nervure import zoo
from nervure._kit import BadData
from nervure.core import heads
from nervure.inspect.cdnv_transfer import class_separability, episodes_accuracy, pair_ratios


def _gaussians(count, seed, *, distance=3.0, width=5, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(2).repeat(count)
    x = scale * torch.randn(2 * count, width, generator=draw).double()
    x[:, 0] += distance * y
    return x, y


def _identity(width, classes=3):
    return nn.Linear(width, classes).double()


def test_gaussian_classes_in_closed_form():
    x, y = _gaussians(4000, 0, scale=1.5)
    found = class_separability(_identity(5), [(x[:3000], y[:3000]), (x[3000:], y[3000:])]).layers["features"]
    # Width sigma^2 over the squared distance of the means.
    truth = 5 * 1.5**2 / 9
    assert abs(found.mean.value - truth) < 3 * found.mean.error
    assert found.mean.error < 0.05 * truth
    assert found.nearest == (0, 1)
    assert found.worst.value == pytest.approx(found.mean.value)


def test_intervals_cover_the_truth():
    inside = 0
    for seed in range(60):
        low, high = class_separability(_identity(5), _gaussians(300, seed)).layers["features"].mean.interval
        inside += low <= 5 / 9 <= high
    assert inside >= 51  # 95% of 60, less three and a half standard errors


@pytest.mark.parametrize("name", ["mlp", "residual-conv", "vit", "lstm"])
def test_every_pair_by_two_passes(name):
    case = zoo.case(name)
    model, (x, y) = case.model(seed=0), case.batch(60, seed=0)
    found = class_separability(model, [(x[:25], y[:25]), (x[25:], y[25:])]).layers["features"]
    rows = heads.head(model, x, method="test").features.double()
    for i, one in enumerate(found.labels):
        for j, two in enumerate(found.labels):
            if i == j:
                assert float(found.pairs[i, j]) == 0
                continue
            a, b = rows[y == one], rows[y == two]
            variances = [(part - part.mean(0)).square().sum(1).mean() for part in (a, b)]
            truth = sum(variances) / (2 * (a.mean(0) - b.mean(0)).square().sum())
            assert float(found.pairs[i, j]) == pytest.approx(float(truth), rel=1e-4)
    off = found.pairs[~torch.eye(len(found.pairs), dtype=torch.bool)]
    assert found.mean.value == pytest.approx(float(off.mean()))
    assert found.worst.value == pytest.approx(float(off.max()))
    assert found.fewest == int(y.bincount()[list(found.labels)].min())


def test_large_means_cost_no_digits():
    x, y = _gaussians(200, 1)
    near = class_separability(_identity(5), (x, y)).layers["features"].mean.value
    far = class_separability(_identity(5), (x + 1e6, y)).layers["features"].mean.value
    assert far == pytest.approx(near, rel=1e-6)


def test_chosen_classes_and_refusals():
    x = torch.randn(90, 4, generator=torch.Generator().manual_seed(2)).double()
    y = torch.arange(3).repeat(30)
    model = _identity(4)
    some = class_separability(model, (x, y), classes=[0, 2]).layers["features"]
    truth = class_separability(model, (x[y != 1], y[y != 1])).layers["features"]
    assert some.labels == (0, 2)
    assert torch.equal(some.pairs, truth.pairs)
    with pytest.raises(BadData, match="one class alone"):
        class_separability(model, (x, y), classes=[1])
    alike = class_separability(model, (torch.ones(40, 4).double(), torch.arange(2).repeat(20)))
    assert math.isinf(alike.layers["features"].mean.value)
    assert alike.verdict == "cannot tell"
    seen = class_separability(nn.Sequential(model, nn.ReLU(), _identity(3)), (x, y), layers=["0", "2"])
    assert list(seen.layers) == ["0", "2"]


def test_verdicts():
    def verdict(distance, count):
        return class_separability(_identity(5), _gaussians(count, 3, distance=distance)).verdict

    assert verdict(6.0, 200) == "ok"
    assert verdict(0.5, 200) in ("warn", "cannot tell")
    assert verdict(1.0, 4000) == "warn"  # 5 / 1
    assert verdict(6.0, 5) == "cannot tell"


@pytest.mark.parametrize("head", ["nearest-mean", "ridge", "logistic"])
def test_many_shots_reach_the_gaussian_error(head):
    x, y = _gaussians(1000, 4, distance=2.0, width=3)
    found = episodes_accuracy(x, y, head=head, shots=300, episodes=20)
    truth = 0.5 * (1 + math.erf(1 / math.sqrt(2)))  # Phi(d / 2 sigma)
    # The samples asked are those of one draw of 2,000.
    assert found.value == pytest.approx(truth, abs=0.03)
    assert 0 < found.error < 0.01


def test_few_shots_reach_the_gaussian_error_of_nearest_means():
    # In one dimension, with k shots the boundary is normal around the middle: error E[Phi(-(d/2 - e))], e ~ N(0, 1/2k).
    x, y = _gaussians(5000, 5, distance=4.0, width=1)
    found = episodes_accuracy(x, y, shots=4, episodes=400)
    normal = torch.distributions.Normal(0.0, 1.0)
    truth = float(normal.cdf(torch.tensor(2.0 / math.sqrt(1 + 1 / 8))))
    assert abs(found.value - truth) < 3 * found.error + 0.003


def test_one_episode_has_no_error_and_too_few_samples_are_refused():
    x, y = _gaussians(10, 6)
    assert episodes_accuracy(x, y, episodes=1).error is None
    with pytest.raises(BadData, match="no such episodes"):
        episodes_accuracy(x, y, head="ridge", shots=10)


def test_two_equal_means_are_infinitely_near():
    from nervure.core.class_moments import ClassMoments

    seen = ClassMoments()
    seen.update(torch.tensor([[0.0], [2.0], [1.0]]), torch.tensor([0, 0, 1]))
    assert pair_ratios(seen).tolist() == [[0, math.inf], [math.inf, 0]]
