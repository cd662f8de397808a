"""Binned information by counting, kernel bounds around a Gaussian channel, gradient ratios batch by batch."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nervure import zoo
from nervure._kit import BadData, UsageError
from nervure.core import heads
from nervure.inspect._plane_trial import WIDTHS, Nets, patterns
from nervure.inspect.information_plane import (
    binned,
    compression,
    gradient_snr,
    kernel_bounds,
    layer_information,
)


def _drawn(count=400, width=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=draw), torch.randint(3, (count,), generator=draw)


def _counted(codes, y):
    """I(X; T) and I(T; Y) from the table of (code, label), in plain Python."""
    n = len(y)
    joint = Counter((tuple(row), int(label)) for row, label in zip(codes.tolist(), y, strict=True))
    code, label = Counter(), Counter()
    for (one, two), count in joint.items():
        code[one] += count
        label[two] += count

    def entropy(table):
        return -sum(count / n * math.log2(count / n) for count in table.values())

    return entropy(code), entropy(code) + entropy(label) - entropy(joint)


@pytest.mark.parametrize("width", [1, 3, 40])
@pytest.mark.parametrize("limits", [(-1.0, 1.0), "range"])
def test_binned_information_by_counting(width, limits):
    x, y = _drawn(width=width)
    found = binned(x, y, bins=6, limits=limits)
    low, high = limits if limits != "range" else (float(x.min()), float(x.max()))
    codes = np.clip(np.floor((x.double().numpy() - low) / (high - low) * 6), 0, 5).astype(int)
    inputs, labels = _counted(codes, y.numpy())
    assert found.inputs == pytest.approx(inputs, abs=1e-9)
    assert found.labels == pytest.approx(labels, abs=1e-9)


def test_quantile_bins_do_not_see_any_rising_function():
    x, y = _drawn()
    one, two = (binned(value, y, bins=5, limits="quantile") for value in (x, (3 * x).exp()))
    assert one == two
    alone = binned(x[:, :1], y, bins=8, limits="quantile")
    assert alone.inputs == pytest.approx(3, abs=1e-9)  # eight bins of fifty
    assert binned(torch.ones(16, 2), y[:16], bins=5, limits="quantile").inputs == 0


def test_known_values():
    x = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]])
    same, other = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    assert binned(x, same, bins=2, limits=(-1, 1)).labels == pytest.approx(1)
    assert binned(x, other, bins=2, limits=(-1, 1)).labels == pytest.approx(0, abs=1e-12)
    low, high = kernel_bounds(100 * x, same, noise=1.0)
    for bound in (low, high):  # two points far apart
        assert bound.inputs == pytest.approx(1)
        assert bound.labels == pytest.approx(1)


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_a_gaussian_channel_lies_within_the_kernel_bounds(noise):
    draw = torch.Generator().manual_seed(1)
    mix = torch.randn(4, 2, generator=draw).double()
    clean = torch.randn(3000, 4, generator=draw).double() @ mix
    truth = 0.5 * float(torch.logdet(torch.eye(2).double() + mix.T @ mix / noise**2)) / math.log(2)
    low, high = kernel_bounds(clean, torch.zeros(3000, dtype=torch.long), noise=noise)
    assert low.inputs < truth < high.inputs
    assert low.labels == pytest.approx(0, abs=1e-9)


def test_no_number_without_a_resolution():
    x, y = _drawn()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    with pytest.raises(UsageError, match="no finite information"):
        layer_information(model, (x, y))
    with pytest.raises(UsageError, match="no such bins"):
        layer_information(model, (x, y), bins=1)
    with pytest.raises(UsageError, match="no such noise"):
        layer_information(model, (x, y), noise=0.0)
    with pytest.raises(BadData, match="not finite"):
        binned(x / 0, y, bins=3, limits="range")


def test_layers_by_name_and_verdicts():
    x, y = _drawn()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    batches = [(x[:150], y[:150]), (x[150:], y[150:])]
    found = layer_information(model, batches, bins=4, limits=(-1, 1), noise=0.3, layers=["1"])
    rows = heads.head(model, x, method="test").features
    assert found.layers["1"].fixed == binned(rows, y, bins=4, limits=(-1, 1))
    assert found.layers["1"].lower.inputs <= found.layers["1"].upper.inputs
    assert found.layers["1"].fixed.inputs <= found.layers["1"].most == pytest.approx(math.log2(400))
    assert layer_information(model, (x, y), noise=1e-6).verdict == "cannot tell"
    assert layer_information(model, (x, y), bins=2, limits="quantile").verdict == "ok"
    case = zoo.case("gru")
    only = layer_information(case.model(), case.batch(8), noise=0.1).layers["features"]
    assert only.fixed is only.quantile is None


def test_compression_starts_when_the_label_is_known():
    assert compression([1.0, 5.0, 4.0, 3.0], [0.1, 0.5, 0.96, 1.0]) == 1.0
    assert compression([1.0, 2.0], [1.0, 1.0]) == -1.0


def test_gradient_ratios_batch_by_batch():
    x, y = _drawn()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batches = [(part.double(), label) for part, label in zip(x.split(100), y.split(100), strict=True)]
    found = gradient_snr(model, batches)
    rows = []
    for batch in batches:
        grads = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), list(model[0].parameters()))
        rows.append(torch.cat([one.flatten() for one in grads]))
    stacked = torch.stack(rows)
    assert found["0"] == pytest.approx(float(stacked.mean(0).norm() / stacked.var(0).sum().sqrt()), rel=1e-9)
    assert list(found) == ["0", "2"]
    assert gradient_snr(model, [batches[0]] * 2)["0"] > 1e6
    with pytest.raises(BadData, match="no deviation"):
        gradient_snr(model, batches[:1])


def test_the_trials_patterns_and_networks():
    x, y = patterns()
    assert x.unique(dim=0).shape == (4096, 12)
    assert 0.3 < float(y.double().mean()) <= 0.5
    nets = Nets(3, torch.Generator().manual_seed(0))
    layers = nets.hidden(x[:5], torch.tanh)
    assert [one.shape[2] for one in layers] == list(WIDTHS[1:])
    by_hand = x[:5]
    for place, (weight, bias) in enumerate(zip(nets.weights, nets.biases, strict=True)):
        by_hand = by_hand @ weight[1] + bias[1]
        by_hand = by_hand if place == len(WIDTHS) - 2 else by_hand.tanh()
    torch.testing.assert_close(layers[-1][1], by_hand)
