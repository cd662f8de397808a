"""Coherence against loops over single examples, constructions with known values, and leaving one out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nervure import zoo
from nervure._kit import BadData, UsageError
from nervure.core.forward import outputs, take, tree_map
from nervure.core.persample import PerSample
from nervure.inspect import m_coherence, median_of_means_, winsorized_
from nervure.inspect._coherence_trial import memorised, mixed_labels
from nervure.inspect.gradient_coherence import Aligned, Coherence


def _wide(value):
    return value.double() if value.is_floating_point() else value


def _loss(output, target):
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def _loop(model, batch, names=None):
    """The gradients one example at a time, flat, shape (N, P)."""
    named = {name: p for name, p in model.named_parameters() if names is None or name in names}
    rows = []
    for n in range(len(batch[1])):
        part = slice(n, n + 1)
        value = _loss(outputs(model, take(batch[0], part)), batch[1][part])
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        pairs = zip(found, named.values(), strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
    return torch.stack(rows)


def _alpha(rows):
    return float(rows.mean(0).square().sum() / rows.square().sum(1).mean())


@pytest.mark.parametrize("name", zoo.names())
def test_every_zoo_model_against_a_loop_over_examples(name):
    case = zoo.case(name)
    model = case.model(seed=0).eval().double()
    inputs, targets = case.batch(6, seed=0)
    batch = (tree_map(_wide, inputs), targets)
    found = m_coherence(
        model, [(take(batch[0], part), targets[part]) for part in (slice(0, 4), slice(4, 6))], loss=_loss
    )
    rows = _loop(model, batch)
    assert found.whole.alpha == pytest.approx(_alpha(rows), rel=1e-9)
    assert found.whole.m_coherence == pytest.approx(6 * _alpha(rows), rel=1e-9)
    layer = next(iter(found.layers))
    own = [n for n, _ in model.named_parameters() if n.rpartition(".")[0] == layer]
    part = _loop(model, batch, own)
    if float(part.abs().max()) > 1e-12:
        assert found.layers[layer].alpha == pytest.approx(_alpha(part), rel=1e-7)


def test_orthogonal_gradients_give_one_equal_ones_m_and_opposing_ones_less():
    model = nn.Linear(5, 1, bias=False).double()

    def loss(output, target):
        return (output[:, 0] * target).mean()

    eye = torch.eye(5).double()
    orthogonal = m_coherence(model, (eye, torch.ones(5).double()), loss=loss).whole
    assert orthogonal.m_coherence == pytest.approx(1, abs=1e-12)
    assert orthogonal.shared == pytest.approx(0, abs=1e-12)
    equal = m_coherence(model, (torch.ones(5, 5).double(), torch.ones(5).double()), loss=loss).whole
    assert equal.m_coherence == pytest.approx(5)
    assert equal.shared == pytest.approx(1)
    signs = torch.tensor([1.0, -1, 1, -1]).double()
    opposing = m_coherence(model, (torch.ones(4, 5).double(), signs), loss=loss).whole
    assert opposing.m_coherence == pytest.approx(0, abs=1e-12)
    assert opposing.shared == pytest.approx(-1 / 3)


def test_copies_of_every_example_multiply_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(7, 4).double(), torch.randint(3, (7,))
    one = m_coherence(model, (x, y)).whole
    three = m_coherence(model, (x.repeat(3, 1), y.repeat(3))).whole
    assert three.m_coherence == pytest.approx(3 * one.m_coherence, rel=1e-12)


def test_the_error_is_that_of_leaving_each_example_out():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch = (torch.randn(9, 4).double(), torch.randint(3, (9,)))
    rows = _loop(model, batch)

    def shared(some):
        gram = some @ some.T
        m = len(some)
        return float((gram.sum() - gram.trace()) / ((m - 1) * gram.trace()))

    left = torch.tensor([shared(torch.cat([rows[:n], rows[n + 1 :]])) for n in range(9)])
    whole = m_coherence(model, batch).whole
    assert whole.shared == pytest.approx(shared(rows), rel=1e-9)
    assert whole.error == pytest.approx(math.sqrt(8 * float(left.var(correction=0))), rel=1e-6)


def test_verdicts():
    def verdict(shared, error):
        return Coherence(Aligned(0.1, 100, shared, error), {}).verdict

    assert verdict(0.1, 0.01) == "ok"
    assert verdict(0.0, 0.001) == "warn"
    assert verdict(0.0, 0.1) == "cannot tell"
    zero = nn.Linear(3, 2)
    nothing = m_coherence(zero, (torch.randn(4, 3), torch.zeros(4, 2)), loss=lambda output, target: output.sum() * 0)
    assert nothing.verdict == "cannot tell"
    assert math.isnan(nothing.whole.alpha)


def test_too_few_examples_are_refused():
    with pytest.raises(BadData, match="at least 3"):
        m_coherence(nn.Linear(3, 2), (torch.randn(2, 3), torch.zeros(2, dtype=torch.long)))


@pytest.mark.parametrize("parts", [3, 4])
def test_the_median_is_that_of_the_parts(parts):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(13, 4), torch.randint(3, (13,))
    gradients = []
    for index in torch.arange(13).tensor_split(parts):
        model.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        gradients.append(model[0].weight.grad.clone())
    model.zero_grad()
    median_of_means_(model, (x, y), parts=parts)
    truth = torch.quantile(torch.stack(gradients), 0.5, dim=0)
    torch.testing.assert_close(model[0].weight.grad, truth)
    with pytest.raises(UsageError, match="cannot be cut"):
        median_of_means_(model, (x[:2], y[:2]))


def test_winsorised_gradients_against_scipy():
    from scipy.stats.mstats import winsorize

    torch.manual_seed(3)
    model = nn.Linear(4, 3)
    batch = (torch.randn(10, 4), torch.randint(3, (10,)))
    rows = PerSample(model, batch, F.cross_entropy).gradients(batch)["weight"]
    winsorized_(model, batch, drop=2)
    truth = winsorize(rows.numpy(), limits=(0.2, 0.2), axis=0).mean(0)
    torch.testing.assert_close(model.weight.grad, torch.from_numpy(truth.data), rtol=1e-5, atol=1e-7)
    with pytest.raises(UsageError, match="cannot be moved"):
        winsorized_(model, batch, drop=5)


def test_the_trial_counts_wrong_labels_alone():
    truth = torch.arange(10).repeat(20)
    labels = mixed_labels(truth, 10, torch.Generator().manual_seed(0))
    assert int((labels != truth).sum()) == 100
    x = F.one_hot(truth, 10).float()

    class Knows(nn.Module):
        def __init__(self, answers):
            super().__init__()
            self.answers, self.scale = answers, nn.Parameter(torch.ones(()))

        def forward(self, rows):
            return rows * self.scale

    assert memorised(Knows(truth), x, truth, labels) == 0
