"""Rich features on a generating model whose Bayes predictors are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from nervure._kit import BadData, UsageError
from nervure.core import forward
from nervure.core.readout import Readout
from nervure.learn.rfc_bonsai import balanced, discover, rich_features, synthesise


def _world(count=2000, *, first=0.9, second=0.75, seed=0):
    """Labels, a feature that agrees with them in 90% of all cases, and one that does in 75%."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (count,), generator=draw)
    agree = torch.rand(count, 2, generator=draw) < torch.tensor([first, second])
    bits = torch.where(agree, y.unsqueeze(1), 1 - y.unsqueeze(1))
    return 2.0 * bits - 1, y, bits


def _build():
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh())


def _least_worst(bits, y):
    """P(y = 1) in each corner under the least of the larger group's mean loss, by constrained optimisation."""
    corner = ((1 - bits[:, 0]) * 2 + 1 - bits[:, 1]).numpy()
    sign, right = 2 * y.numpy() - 1, (bits[:, 0] == y).numpy()

    def worst(odds):
        losses = np.logaddexp(0, -sign * odds[corner])
        return np.array([losses[right].mean(), losses[~right].mean()])

    found = minimize(
        lambda v: v[4],
        [1.0, -1, 1, -1, 1],
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda v: v[4] - worst(v[:4])},
        options={"ftol": 1e-10},
    )
    assert found.success
    return list(1 / (1 + np.exp(-found.x[:4])))


def test_rounds_are_the_bayes_predictors():
    x, y, bits = _world()
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    found = discover(_build, (x, y), steps=(100, 300), lr=0.02)
    first, second = (forward.predict(one, corners).argmax(1) for one in found.predictors)
    # 0.9 against 0.75: the first feature decides. Where it is right or wrong counts alike in round 1: no use of it.
    assert first.tolist() == [1, 1, 0, 0]
    assert second.tolist() == [1, 0, 1, 0]
    assert torch.equal(found.right[0], bits[:, 0] == y)
    assert torch.equal(found.pseudo[1], bits[:, 1])
    # The least of the larger loss, over all functions of both features: on average 3/4 by the second alone.
    chances = forward.predict(found.predictors[1], corners).softmax(1)[:, 1]
    assert chances.tolist() == pytest.approx(_least_worst(bits, y), abs=0.04)
    made = synthesise(_build, (x, y), found, steps=200, lr=0.02)
    scores = forward.predict(made, x)
    assert scores.shape == (2000, 2, 2)
    assert torch.equal(scores.argmax(2).T, found.pseudo)
    rich = forward.predict(made.extractor, x)
    assert Readout(rich, bits[:, 0]).accuracy(rich, bits[:, 0]) == 1
    assert Readout(rich, bits[:, 1]).accuracy(rich, bits[:, 1]) == 1


def test_a_split_that_says_nothing_leaves_the_first_feature():
    from dataclasses import replace

    x, y, bits = _world()
    first = discover(_build, (x, y), steps=(100,), lr=0.02)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(1))
    again = discover(_build, (x, y), steps=(200,), lr=0.02, after=replace(first, right=first.right[:, order]))
    assert len(again.predictors) == 2
    assert torch.equal(again.pseudo[1], bits[:, 0])


def test_one_call_equals_the_phases_and_minibatches_find_the_same():
    x, y, bits = _world(1000)
    extractor, found = rich_features(_build, (x, y), steps=(40, 60, 30), lr=0.02, seed=3)
    parts = discover(_build, (x, y), steps=(40,), lr=0.02, seed=3)
    parts = discover(_build, (x, y), steps=(60,), lr=0.02, seed=3, after=parts)
    assert torch.equal(parts.pseudo, found.pseudo)
    made = synthesise(_build, (x, y), parts, steps=30, lr=0.02, seed=3)
    assert torch.equal(forward.predict(made.extractor, x), forward.predict(extractor, x))
    small = discover(_build, (x, y), steps=(150, 400), lr=0.02, batch_size=200)
    assert float((small.pseudo[1] == bits[:, 1]).double().mean()) > 0.95


def test_three_rounds_use_all_splits():
    draw = torch.Generator().manual_seed(2)
    y = torch.randint(2, (3000,), generator=draw)
    agree = torch.rand(3000, 3, generator=draw) < torch.tensor([0.95, 0.85, 0.7])
    bits = torch.where(agree, y.unsqueeze(1), 1 - y.unsqueeze(1))

    def build():
        return nn.Sequential(nn.Linear(3, 24), nn.Tanh())

    found = discover(build, (2.0 * bits - 1, y), steps=(100, 300, 400), lr=0.02)
    agreement = (found.pseudo.unsqueeze(2) == bits.unsqueeze(0)).double().mean(1)
    assert agreement.argmax(1).tolist() == [0, 1, 2]


def test_weights_of_the_synthesis():
    right = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    truth = [(1 / 3 + 1) / 4, (1 / 3 + 1 / 3) / 4, (1 / 3 + 1 / 3) / 4, (1 + 1 / 3) / 4]
    assert balanced(right).tolist() == pytest.approx(truth)
    assert balanced(right[:0]).tolist() == [0.25] * 4


def test_dict_inputs_the_random_stream_and_errors():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 8)

        def forward(self, left, right):
            return torch.relu(self.linear(torch.cat([left, right], 1))).unsqueeze(1)

    x, y, _ = _world(100)
    state = torch.get_rng_state()
    extractor, found = rich_features(Two, ({"left": x[:, :1], "right": x[:, 1:]}, y), steps=(5, 5, 5))
    assert torch.equal(state, torch.get_rng_state())
    assert len(found.predictors) == 2
    assert extractor(left=x[:, :1], right=x[:, 1:]).shape == (100, 1, 8)
    with pytest.raises(UsageError, match="no round"):
        discover(_build, (x, y), steps=())
    with pytest.raises(UsageError, match="too few phases"):
        rich_features(_build, (x, y), steps=(5,))
    with pytest.raises(BadData, match="no classes"):
        discover(_build, (x, torch.zeros(100, dtype=torch.long)))
