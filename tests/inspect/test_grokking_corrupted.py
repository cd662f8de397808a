"""Fourier concentration by sums written out, a network of cosines that is exact, and silenced units by surgery."""

from __future__ import annotations

import cmath
import copy
import math

import pytest
import torch
from torch import nn

from nervure import zoo
from nervure._kit import BadData, NoEffect, Unsupported, UsageError
from nervure.core import forward
from nervure.core.taps import execution_order, tap
from nervure.inspect._delayed import pairs, quadratic_mlp
from nervure.inspect.grokking import operation
from nervure.inspect.grokking_corrupted import corrupt, ipr, silence_by, silenced


def ipr_by_hand(values, orders, r):
    """Sum over the characters of a product of two cyclic groups, one at a time."""
    n, m = orders
    energy = {}
    for k in range(n):
        for j in range(m):
            total = sum(
                values[a * m + b] * cmath.exp(-2j * math.pi * (k * a / n + j * b / m))
                for a in range(n)
                for b in range(m)
            )
            key = frozenset({(k, j), (-k % n, -j % m)})
            energy[key] = energy.get(key, 0) + abs(total) ** 2
    return sum(e**r for e in energy.values()) / sum(energy.values()) ** r


@pytest.mark.parametrize(("orders", "r"), [((7, 1), 2), ((6, 1), 2), ((4, 3), 2), ((2, 6), 3)])
def test_ipr_equals_the_sum_over_characters(orders, r):
    values = torch.randn(orders[0] * orders[1], 3, dtype=torch.float64)
    by_hand = [ipr_by_hand(column.tolist(), orders, r) for column in values.T]
    assert ipr(values, shape=orders, r=r).tolist() == pytest.approx(by_hand, rel=1e-10)


def exact_network(p):
    """f = V (U x)^2 with cosines: sum over s, phi of cos(sa + phi) cos(sb + phi) cos(sc + 2 phi) peaks at c = a + b."""
    rows, reads = [], []
    t = torch.arange(p, dtype=torch.float64) * 2 * math.pi / p
    for s in range(1, (p + 1) // 2):
        for phase in torch.arange(8, dtype=torch.float64) * 2 * math.pi / 8:
            rows.append(torch.cat([torch.cos(s * t + phase), torch.cos(s * t + phase)]))
            reads.append(torch.cos(s * t + 2 * phase))
    model = quadratic_mlp(p, len(rows)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.stack(rows))
        model[2].weight.copy_(torch.stack(reads, 1))
    return model


@pytest.mark.parametrize("p", [5, 11])
def test_the_network_of_cosines_is_exact_and_has_the_largest_ipr(p):
    model = exact_network(p)
    answers = model(pairs(p).double()).argmax(-1)
    assert torch.equal(answers, operation("a+b", p).flatten())
    into, out = model[0].weight, model[2].weight
    for values in (into[:, :p].T, into[:, p:].T, out):
        assert ipr(values).tolist() == pytest.approx([1.0] * values.shape[1])


def test_low_ipr_units_are_found_where_they_are_planted():
    p = 11
    model = exact_network(p)
    width, extra = model[0].out_features, 30
    noisy = quadratic_mlp(p, width + extra).double()
    with torch.no_grad():
        noisy[0].weight[:width], noisy[2].weight[:, :width] = model[0].weight, model[2].weight
        noisy[0].weight[width:] = torch.randn(extra, 2 * p).double() * 2
        noisy[2].weight[:, width:] = torch.randn(p, extra).double() * 2
    x, y = pairs(p).double(), operation("a+b", p).flatten()
    share = extra / (width + extra)
    found = silence_by(noisy, "1", ipr(noisy[0].weight[:, :p].T), {"all": (x, y)}, shares=(0.0, share))
    assert found.lowest["all"][0] == found.chance["all"][0] < 0.9
    assert found.lowest["all"][1] == 1
    assert found.chance["all"][1] < 0.9
    assert found.gain("all") > 0.05


def test_silenced_equals_a_network_without_the_units():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
    x, mask = torch.randn(9, 5), torch.tensor([True, False, False, True, True, False])
    without = copy.deepcopy(model)
    without[2].weight.data[:, mask] = 0
    before = model(x)
    with silenced(model, "1", mask):
        torch.testing.assert_close(model(x), without(x))
    assert torch.equal(model(x), before)
    with pytest.raises(RuntimeError), silenced(model, "1", mask):
        raise RuntimeError
    assert not model[1]._forward_hooks
    conv = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten())
    with silenced(conv, "0", torch.tensor([1]), axis=1):
        out = conv(torch.randn(2, 1, 5, 5)).detach().view(2, 3, -1)
    assert float(out[:, 1].abs().max()) == 0
    assert float(out[:, 0].abs().min()) > 0


@pytest.mark.parametrize("name", zoo.names())
def test_units_of_every_zoo_model_can_be_silenced(name):
    case = zoo.case(name)
    model, (x, y) = case.model(), case.batch(6)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    layers = [each for each in execution_order(model, x) if not isinstance(model.get_submodule(each), nn.RNNBase)]
    layer = layers[len(layers) // 2]
    with forward.mode(model, train=False), tap(model, [layer]) as seen, torch.no_grad():
        forward.call(model, x)
    value = seen[layer][0]
    axis = 1 if value.ndim == 4 else -1
    width = value.shape[axis]
    found = silence_by(model, layer, torch.arange(float(width)), {"batch": (x, y)}, shares=(0.0, 0.5, 1.0), axis=axis)
    right = (forward.predict(model, x).argmax(-1) == y).double().mean()
    assert float(found.lowest["batch"][0]) == float(found.chance["batch"][0]) == pytest.approx(float(right))
    with silenced(model, layer, torch.arange(width), axis=axis), tap(model, [layer]) as seen:
        forward.predict(model, x)
    assert all(float(each.abs().max()) == 0 for each in seen[layer])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_corrupted_answers_are_wrong_and_as_many_as_asked():
    y = torch.randint(5, (1000,))
    told, wrong = corrupt(y, 0.2, 5)
    assert int(wrong.sum()) == 200
    assert torch.equal(told != y, wrong)
    assert int(told.max()) == 4
    counts = ((told - y) % 5)[wrong].bincount(minlength=5)
    assert int(counts[1:].min()) > 25
    assert torch.equal(corrupt(y, 0.2, 5)[0], told)


def test_wrong_use_is_told():
    net = nn.Sequential(nn.LSTM(3, 4), nn.Identity())
    with pytest.raises(NoEffect, match="no module"), silenced(net, "9", torch.tensor([0])):
        pass
    with pytest.raises(Unsupported, match="no single tensor"), silenced(net, "0", torch.tensor([0])):
        net(torch.randn(2, 3, 3))
    with pytest.raises(UsageError, match="no such spectrum"):
        ipr(torch.randn(5, 2), shape=(2, 3))
    with pytest.raises(UsageError, match="nothing to corrupt"):
        corrupt(torch.zeros(3).long(), 2.0, 5)
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(BadData, match="one for each unit"):
        silence_by(model, "0", torch.zeros(3), {"a": (torch.randn(2, 3), torch.zeros(2).long())})
