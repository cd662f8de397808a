"""Flatness against dense Hessians, one-sample SAM against a loop, the memoriser against its closed form."""

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
from nervure.arena.context import Context
from nervure.core.operators import gauss_newton
from nervure.inspect import flatness, memoriser, one_sam_
from nervure.inspect._flatness_trial import INPUTS, Arm, TwoLayer, cube, trained


def _dense(model, x, y, loss):
    names = dict(model.named_parameters())
    sizes = [value.numel() for value in names.values()]

    def whole(flat):
        parts = zip(flat.split(sizes), names.items(), strict=True)
        return loss(functional_call(model, {name: part.view_as(v) for part, (name, v) in parts}, (x,)), y)

    return hessian(whole, torch.cat([value.detach().flatten() for value in names.values()]))


def _net(out=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, out)).double()


@pytest.mark.parametrize("batches", [1, 2])
def test_at_a_fit_of_squares_the_trace_is_the_dense_hessians(batches):
    model, x = _net(), torch.randn(8, 3).double()
    y = model(x).detach()
    found = flatness(model, (x, y) if batches == 1 else [(x[:5], y[:5]), (x[5:], y[5:])], loss=F.mse_loss)
    H = _dense(model, x, y, F.mse_loss)
    assert found.gauss_newton == pytest.approx(float(H.trace()), rel=1e-6)
    assert found.sharpness == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-4)
    assert found.trace.low - 1e-6 <= float(H.trace()) <= found.trace.high + 1e-6
    alone = [float(_dense(model, x[n : n + 1], y[n : n + 1], F.mse_loss).trace()) for n in range(8)]
    assert found.sharpest_sample == pytest.approx(max(alone), rel=1e-6)
    assert found.loss < 1e-30
    assert found.fitted


def test_away_from_a_fit_it_is_the_gauss_newton_matrix():
    model, x = _net(3), 2 * torch.randn(8, 3).double()
    y = torch.randint(3, (8,))
    found = flatness(model, (x, y))
    truth = gauss_newton(model, (x, y), F.cross_entropy).dense()
    assert found.gauss_newton == pytest.approx(float(truth.trace()), rel=1e-6)
    far = flatness(_net(1), (x, 50 * torch.randn(8, 1).double()), loss=F.mse_loss)
    assert not far.fitted


def test_one_output_without_an_axis():
    net = TwoLayer(torch.randn(5, 4), torch.randn(5), torch.randn(5))
    x = torch.randn(6, 4)
    y = net(x).detach()
    found = flatness(net, (x, y), loss=F.mse_loss)
    grads = [torch.cat([g.flatten() for g in torch.autograd.grad(net(x[n : n + 1]).sum(), list(net.parameters()))])
             for n in range(6)]  # fmt: skip
    assert found.gauss_newton == pytest.approx(2 * sum(float(g.square().sum()) for g in grads) / 6, rel=1e-5)


def test_one_sample_sam_against_copies_that_were_moved():
    model, (x, y) = _net(3), (torch.randn(4, 3).double(), torch.randint(3, (4,)))
    before = [value.detach().clone() for value in model.parameters()]
    value = one_sam_(model, (x, y), rho=0.3)
    assert value == pytest.approx(float(F.cross_entropy(model(x), y).detach()))
    total = [torch.zeros_like(v) for v in before]
    for n in range(4):
        twin = copy.deepcopy(model)
        grads = torch.autograd.grad(F.cross_entropy(twin(x[n : n + 1]), y[n : n + 1]), list(twin.parameters()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        with torch.no_grad():
            for p, g in zip(twin.parameters(), grads, strict=True):
                p += 0.3 * g / norm
        moved = torch.autograd.grad(F.cross_entropy(twin(x[n : n + 1]), y[n : n + 1]), list(twin.parameters()))
        total = [a + b / 4 for a, b in zip(total, moved, strict=True)]
    for parameter, old, truth in zip(model.parameters(), before, total, strict=True):
        assert torch.equal(parameter, old)
        torch.testing.assert_close(parameter.grad, truth)
    with pytest.raises(UsageError, match="radius"):
        one_sam_(model, (x, y), rho=-1)


def test_the_weights_come_back_when_a_loss_fails():
    model, x = _net(3), torch.randn(2, 3).double()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def loss(output, target):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("no")
        return output.square().sum()

    with pytest.raises(ValueError, match="no"):
        one_sam_(model, (x, x), loss=loss)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_memoriser_fits_is_as_flat_as_its_closed_form_and_knows_nothing():
    draw = torch.Generator().manual_seed(0)
    x, y = cube(40, draw)
    net = nn.Sequential(memoriser(x.double(), y.double()), nn.Flatten(0))
    torch.testing.assert_close(net(x.double()), y.double())
    found = flatness(net, (x.double(), y.double()), loss=F.mse_loss)
    assert found.gauss_newton == pytest.approx(4 * math.sqrt(INPUTS + 1), rel=1e-9)
    assert float((net(cube(500, draw)[0].double()) != 0).double().mean()) < 0.01
    # No rescaling of its units, which keeps the function, makes it flatter.
    for factor in (0.8, 1.25):
        twin = copy.deepcopy(net)
        with torch.no_grad():
            twin[0][0].weight *= factor
            twin[0][0].bias *= factor
            twin[0][2].weight /= factor
        assert flatness(twin, (x.double(), y.double()), loss=F.mse_loss).gauss_newton > found.gauss_newton
    with pytest.raises(BadData, match="distinct points"):
        memoriser(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(BadData, match="other than zero"):
        memoriser(torch.eye(2), torch.zeros(2))


@pytest.mark.parametrize("normed", [False, True])
def test_the_trials_steps_are_one_sample_sam(normed):
    ctx = Context("test", 0)
    x, y = cube(6, torch.Generator().manual_seed(1))
    arms = {"bias": Arm(y, bias=True, normed=normed), "none": Arm(y, bias=False, normed=normed, rho=0.0)}
    starts, ends = trained(ctx, x, arms, steps=0), trained(ctx, x, arms, steps=3)
    for name, arm in arms.items():
        net, draw = starts[name], ctx.generator("start")
        torch.rand(256, INPUTS, generator=draw), torch.rand(256, generator=draw), torch.rand(256, generator=draw)
        for step in range(3):
            n = int(torch.randint(6, (), generator=draw))
            one_sam_(net, (x[n : n + 1], y[n : n + 1]), loss=F.mse_loss, rho=arm.rho)
            rate = 0.005 * min(1.0, 4 * (1 - step / 3))
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= rate * parameter.grad
        for mine, theirs in zip(net.parameters(), ends[name].parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
