"""Opposing groups against stored weights, dense Hessians, loops over groups, and a toy that swings every two steps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from nervure._kit import BadData, UsageError
from nervure.core.recorder import Recorder, losses_of
from nervure.inspect import find_spike, opposing_groups


def _square(output, target):
    return (output - target).square().sum(1).mean() / 2


def _net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 2)).double()


def _batch(n=40):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, generator=draw, dtype=torch.float64)
    return x, torch.randn(n, 2, generator=draw, dtype=torch.float64)


def _trajectory(model, batch, rate, steps):
    """Weights and losses of a plain loop that stores everything."""
    twin, weights, losses = copy.deepcopy(model), [], []
    optimizer = torch.optim.SGD(twin.parameters(), lr=rate)
    for step in range(steps + 1):
        weights.append(copy.deepcopy(twin))
        each = (twin(batch[0]) - batch[1]).square().sum(1) / 2
        losses.append(each.detach())
        optimizer.zero_grad()
        each.mean().backward()
        if step < steps:
            optimizer.step()
    return weights, torch.stack(losses)


@pytest.mark.parametrize("parts", [1, 2])
def test_everything_against_a_loop_that_stores_all_weights(parts):
    model, (x, y) = _net(), _batch()
    data = (x, y) if parts == 1 else [(x[:25], y[:25]), (x[25:], y[25:])]
    found = opposing_groups(model, data, loss=_square, learning_rate=0.9, steps=30, fraction=0.2)
    weights, losses = _trajectory(model, (x, y), 0.9, 30)
    torch.testing.assert_close(found.losses, losses, rtol=1e-6, atol=1e-9)
    spike = found.spike
    mean = losses.mean(1)
    assert spike.step == int((mean[1:-1] - mean[:-2]).argmax())
    change = losses[spike.step + 1] - losses[spike.step]
    assert set(spike.rising.tolist()) == set(change.argsort()[-4:].tolist())
    assert set(spike.falling.tolist()) == set(change.argsort()[:4].tolist())
    share = float(change.abs().sort().values[-8:].sum() / change.abs().sum())
    assert spike.share == pytest.approx(share, rel=1e-6)
    assert spike.uniform == 0.2

    for signals, there in ((found.before, weights[spike.step]), (found.after, weights[spike.step + 1])):
        names = dict(there.named_parameters())
        sizes = [value.numel() for value in names.values()]

        def whole(flat, there=there, names=names, sizes=sizes):
            parts = zip(flat.split(sizes), names.items(), strict=True)
            values = {name: part.view_as(value) for part, (name, value) in parts}
            return _square(functional_call(there, values, x), y)

        flat = torch.cat([value.detach().flatten() for value in names.values()])
        values, vectors = torch.linalg.eigh(hessian(whole, flat))
        assert signals.sharpness == pytest.approx(float(values[-1]), rel=1e-5)
        pulls = []
        for group in (spike.rising, spike.falling):
            grads = torch.autograd.grad(_square(there(x[group]), y[group]), list(there.parameters()))
            pulls.append(torch.cat([g.flatten() for g in grads]))
        assert signals.cosine == pytest.approx(float(F.cosine_similarity(*pulls, dim=0)), abs=1e-5)
        along = [float(pull @ vectors[:, -1]) for pull in pulls]
        assert abs(signals.rising) == pytest.approx(abs(along[0]), rel=1e-2, abs=1e-4)
        assert signals.rising * signals.falling == pytest.approx(along[0] * along[1], rel=1e-2, abs=1e-4)
    assert found.features.shape == (5,)


def test_two_opposing_groups_swing_with_a_period_of_two_steps():
    # One large feature that both groups share, with opposite targets, and a small feature all agree on.
    n = 24
    x = torch.zeros(n, 2).double()
    x[:4, 0], x[4:, 1] = 6.0, 0.3
    y = torch.zeros(n, 1).double()
    y[:2], y[2:4], y[4:] = 1.0, -1.0, 0.2
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.02, 0.0], [0.0, 0.5]]))
        model[1].weight.copy_(torch.tensor([[0.9, 0.5]]))
    # The curvature along the shared feature is 6 * 0.9^2; the rate is just above 2 over it.
    rate = 2.05 / (6 * 0.9**2)
    found = opposing_groups(model, (x, y), loss=_square, learning_rate=rate, steps=8, fraction=4 / n, least=0.0)
    spike = found.spike
    assert {*spike.rising.tolist()} in ({0, 1}, {2, 3})
    assert {*spike.falling.tolist()} in ({0, 1}, {2, 3})
    assert spike.next_step == pytest.approx(-1, abs=0.02)
    assert spike.share > 0.99
    swing = (found.losses[1:, 0] - found.losses[:-1, 0]).sign()
    assert (swing[1:] == -swing[:-1]).all()
    assert found.before.cosine < -0.9
    assert found.before.rising * found.before.falling < 0
    assert found.verdict == "warn"


def test_below_the_edge_there_is_no_spike():
    found = opposing_groups(_net(), _batch(), loss=_square, learning_rate=0.01, steps=30)
    assert found.spike is None
    assert found.before is None
    assert math.isnan(found.gap)
    assert found.verdict == "ok"


def test_a_recorder_of_ones_own_loop_and_another_optimizer_give_the_same():
    model, (x, y) = _net(), _batch()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5, momentum=0.8)
    recorder = Recorder({"losses": losses_of(twin, x, y, _square)}, every=1)
    for step in range(21):
        recorder.step(step)
        optimizer.zero_grad()
        _square(twin(x), y).backward()
        optimizer.step()
    spike = find_spike(recorder.curve("losses"))
    found = opposing_groups(model, (x, y), loss=_square,
                            optimizer=lambda chosen: torch.optim.SGD(chosen, lr=0.5, momentum=0.8))  # fmt: skip
    assert (found.spike.step, found.spike.rising.tolist()) == (spike.step, spike.rising.tolist())


def test_refusals():
    with pytest.raises(BadData, match="3 steps of 4 samples"):
        find_spike(torch.ones(2, 9))
    with pytest.raises(BadData, match="finite"):
        find_spike(torch.full((5, 9), math.inf))
    with pytest.raises(UsageError, match="0 < fraction"):
        find_spike(torch.ones(5, 9), fraction=0)
    with pytest.raises(UsageError, match="at least 2 steps"):
        opposing_groups(_net(), _batch(), loss=_square, steps=1)
