"""The irrelevance decay against its formula, AdamW and a geometric series."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nervure import zoo
from nervure._kit import UsageError
from nervure.compress import IrrelevanceDecay, IrrelevancePruner
from nervure.core import modules
from nervure.spec import Budget
from nervure.testing import toy_task


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).double()
    return net, torch.randn(20, 6, dtype=torch.float64), torch.randint(4, (20,))


@pytest.mark.parametrize("scale", ["layer", "none"])
def test_the_update_is_the_formula(scale):
    net, x, y = problem()
    F.cross_entropy(net(x), y).backward()
    expected = {}
    for name, weight in net.named_parameters():
        rows = []
        mean = float(weight.grad.abs().mean()) if scale == "layer" else 1.0
        for w, g in zip(weight.flatten().tolist(), weight.grad.flatten().tolist(), strict=True):
            rows.append(w - 0.01 * math.exp(-abs(g) / mean) * w if weight.ndim == 2 else w)
        expected[name] = torch.tensor(rows, dtype=torch.float64).view_as(weight)
    IrrelevanceDecay(net, strength=0.01, scale=scale)()
    for name, weight in net.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-12, atol=0)


def test_a_coefficient_of_one_is_adamw():
    class Plain(IrrelevanceDecay):
        def coefficient(self, weight, gradient):
            return torch.ones_like(weight)

    net, x, y = problem()
    twin = copy.deepcopy(net)
    weights = [layer.weight for layer in twin if isinstance(layer, nn.Linear)]
    biases = [layer.bias for layer in twin if isinstance(layer, nn.Linear)]
    theirs = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}], lr=0.02
    )
    ours = torch.optim.Adam(net.parameters(), lr=0.02)
    ours.register_step_pre_hook(Plain(net, strength=0.002))
    for _ in range(25):
        for model, optimizer in ((net, ours), (twin, theirs)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    for one, two in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_weights_the_loss_does_not_feel_shrink_geometrically():
    net = nn.Linear(3, 2)
    start = net.weight.detach().clone()
    net.weight.grad, net.bias.grad = torch.zeros(2, 3), torch.zeros(2)
    decay = IrrelevanceDecay(net, strength=0.1)
    for _ in range(5):
        decay()
    torch.testing.assert_close(net.weight.detach(), start * 0.9**5)


def test_a_weight_without_a_gradient_stays():
    net = nn.Linear(3, 2)
    start = net.weight.detach().clone()
    IrrelevanceDecay(net, strength=0.5)()
    assert torch.equal(net.weight, start)


@pytest.mark.parametrize("case", zoo.cases(), ids=lambda case: case.name)
def test_every_connection_weight_of_the_zoo_is_decayed_and_nothing_else(case):
    model = case.model(seed=0)
    case.loss(model, case.batch(4, seed=0)).backward()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    IrrelevanceDecay(model, strength=0.5)()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name, weight in modules.weights(model).items() if weight.grad is not None}


def test_the_pruner_decays_before_pruning_only():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    plain, decayed = (
        IrrelevancePruner(strength=s).fit(net, toy_task(), Budget(target=0.3, steps=20), seed=0) for s in (0.0, 0.2)
    )
    assert plain.report()["density"] == decayed.report()["density"]
    sizes = [
        sum(float(p.detach().norm()) for p in found.model.parameters() if p.ndim == 2) for found in (plain, decayed)
    ]
    assert sizes[1] < sizes[0]


def test_the_strength_is_a_share():
    with pytest.raises(UsageError, match="0 <= strength < 1"):
        IrrelevanceDecay(nn.Linear(2, 2), strength=1.0)
