"""Tangent kernels by closed form and torch.func, linearised training step by step, the wrapper on every zoo model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

from nervure import zoo
from nervure._kit import BadData, UsageError
from nervure.core import forward
from nervure.core.layerwise import tangent_kernel
from nervure.inspect.grokking_lazy_rich import (
    LazyRich,
    Polynomial,
    alignment,
    laziness,
    linearised,
    quadratic_regression,
)


def jacobian(model, inputs):
    parameters = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    found = jacrev(lambda p: functional_call(model, p, (inputs,)))(parameters)
    count = len(inputs)
    return torch.cat([value.reshape(count, -1, parameters[name].numel()) for name, value in found.items()], -1)


def small(alpha=1.0):
    torch.manual_seed(0)
    return LazyRich(Polynomial(4, 12, 0.5).double(), alpha)


def test_kernel_of_the_polynomial_network_by_its_closed_form():
    model, x, others = small(3.0), torch.randn(7, 4).double(), torch.randn(5, 4).double()
    w = model.model.units.weight.detach()
    slopes = [1 + 0.5 * each @ w.T for each in (x, others)]
    closed = (3 / 12) ** 2 * (x @ others.T) * (slopes[0] @ slopes[1].T)
    torch.testing.assert_close(tangent_kernel(model, x, others), closed, rtol=1e-10, atol=1e-12)
    J, K = (jacobian(model, each)[:, 0] for each in (x, others))
    torch.testing.assert_close(J @ K.T, closed, rtol=1e-10, atol=1e-12)


def test_kernel_sums_over_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4)).double()
    x = torch.randn(6, 1, 5, 5).double()
    J = jacobian(model, x)
    torch.testing.assert_close(tangent_kernel(model, x), torch.einsum("nop,mop->nm", J, J), rtol=1e-10, atol=1e-12)


def test_linearised_curve_equals_gradient_descent_on_the_linearised_network():
    model, x, new = small(), torch.randn(6, 4).double(), torch.randn(3, 4).double()
    y, rate = torch.randn(6).double(), 0.7
    J, K = (jacobian(model, each)[:, 0] for each in (x, new))
    moved, seen = torch.zeros(J.shape[1]).double(), []
    for _ in range(50):
        seen.append(K @ moved)
        moved = moved - rate * 2 / 6 * J.T @ (J @ moved - y)
    found = linearised(tangent_kernel(model, x), tangent_kernel(model, new, x), y, rate, range(50))
    torch.testing.assert_close(found, torch.stack(seen), rtol=1e-8, atol=1e-10)
    # A kernel without full rank: what it cannot see stays.
    flat = linearised(torch.ones(3, 3), torch.ones(1, 3), torch.tensor([1.0, 2.0, 6.0]), 0.1, [10_000])
    assert float(flat[0, 0]) == pytest.approx(3)


def test_a_large_scale_gives_kernel_regression_and_a_small_one_does_not():
    x, new = torch.randn(6, 4).double(), torch.randn(40, 4).double()
    y, steps, gaps = torch.randn(6).double(), 1000, {}
    for alpha in (1.0, 1000.0):
        model = small(alpha)
        start = small(1.0)
        rate = 0.4 * 6 / float(torch.linalg.eigvalsh(tangent_kernel(start, x))[-1])
        optimizer = torch.optim.SGD(model.model.parameters(), model.rate(rate))
        for _ in range(steps):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        predicted = linearised(tangent_kernel(start, x), tangent_kernel(start, new, x), y, rate, [steps])[0]
        gaps[alpha] = float((model(new).detach() - predicted).norm() / predicted.norm())
    assert gaps[1000.0] < 0.01 < 0.1 < gaps[1.0]


def test_laziness_tells_lazy_training_from_rich():
    torch.manual_seed(0)
    x, y = torch.randn(20, 4).double(), torch.randn(20).double()
    found = {}
    for alpha in (1.0, 100.0):
        net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0)).double()
        lazy = LazyRich(net, alpha)
        optimizer = torch.optim.SGD(net.parameters(), lazy.rate(0.2))
        for _ in range(300):
            optimizer.zero_grad()
            F.mse_loss(lazy(x), y).backward()
            optimizer.step()
        found[alpha] = laziness(lazy.model, lazy.start, x, y)
    rich, tame = found[1.0], found[100.0]
    for name in ("weight", "kernel", "kernel_direction"):
        assert getattr(tame, name) < 0.2 * getattr(rich, name)
    assert tame.features["1"] < 0.2 * rich.features["1"]
    assert rich.features["0"] > 0
    assert rich.aligned[0] > rich.aligned[1]


def test_alignment_by_hand():
    K, y = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, -1.0])
    assert alignment(K, y) == pytest.approx(3 / (15**0.5 * 2))
    assert alignment(torch.outer(y, y), y) == pytest.approx(1)
    labels = torch.tensor([0, 1])
    assert alignment(torch.eye(2), labels) == pytest.approx(1)
    assert alignment(torch.zeros(2, 2), y) == 0
    with pytest.raises(BadData, match="one target"):
        alignment(K, torch.zeros(3))


@pytest.mark.parametrize("name", zoo.names())
def test_every_zoo_model_can_be_made_lazy_and_compared(name):
    case = zoo.case(name)
    model, (x, y) = case.model(), case.batch(4)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    start = case.model(seed=1)
    report = laziness(model, start, x)
    same = laziness(model, copy.deepcopy(model), x)
    assert 0.1 < report.weight < 100
    assert report.kernel > 1e-3
    assert same.weight == same.kernel == 0
    assert max(same.features.values()) < 1e-6 < max(report.features.values())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(value.grad is None and value.requires_grad for value in model.parameters())
    lazy = LazyRich(copy.deepcopy(model), 4.0)
    for train in (True, False):
        # Not 0 where torch runs a fused kernel in the copy without gradients.
        assert float(forward.call(lazy.train(train), x).detach().abs().max()) < 1e-5
    output = forward.call(lazy.train(), x)
    F.cross_entropy(output.flatten(0, -2), y.flatten()).backward()
    with torch.no_grad():
        for value in lazy.model.parameters():
            value -= 0.1 * (value.grad if value.grad is not None else 0)
    assert all(value.grad is None for value in lazy.start.parameters())
    expected = 4 * (forward.predict(lazy.model, x) - forward.predict(lazy.start, x))
    torch.testing.assert_close(forward.predict(lazy, x), expected)
    assert float(expected.abs().max()) > 0


def test_dropout_is_the_same_in_both_copies():
    lazy = LazyRich(nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 2)), 2.0)
    assert float(lazy(torch.randn(4, 3)).abs().max().detach()) == 0
    again = LazyRich(nn.Linear(3, 2), 2.0)
    again.load_state_dict(LazyRich(nn.Linear(3, 2), 2.0).state_dict())


def test_the_task_is_the_one_stated():
    task = quadratic_regression(0, samples=60, alpha=2.0)
    x, y = task.train
    assert x.shape == (60, 32)
    assert float(task.test[0].square().sum(1).mean()) == pytest.approx(1, abs=0.05)
    features = torch.stack([x[:, i] * x[:, j] for i in range(32) for j in range(i + 1)], 1).double()
    new = torch.stack([task.test[0][:, i] * task.test[0][:, j] for i in range(32) for j in range(i + 1)], 1).double()
    both, targets = torch.cat([features, new]), torch.cat([y, task.test[1]]).double()
    residual = targets - both @ torch.linalg.lstsq(both, targets[:, None]).solution[:, 0]
    assert float(residual.abs().max()) < 1e-4
    assert task.build().alpha == 2.0


def test_wrong_use_is_told():
    with pytest.raises(UsageError, match="not positive"):
        LazyRich(nn.Linear(2, 2), 0.0)
    with pytest.raises(BadData, match="nothing to compare"):
        laziness(nn.Linear(2, 2), nn.Linear(2, 3), torch.randn(4, 2))
    with pytest.raises(BadData, match="nothing to compare"):
        laziness(nn.Linear(2, 2), nn.Linear(2, 2), torch.randn(3, 2))
