import math

import pytest
import torch
from torch import nn

from nervure.compress.masks_signs_lrr import neuron_flow, perturb_signs, sign_flips
from nervure.core import masks


def loss(a, w):
    """The closed form of E[(a relu(w.x) - relu(x_1))^2] / 2, written down separately."""
    norm = w.norm()
    angle = torch.acos(w[0] / norm)
    return a**2 * norm**2 / 4 - a * norm * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi) + 0.25


def test_the_closed_form_is_the_population_loss():
    draw = torch.Generator().manual_seed(0)
    a, w = torch.tensor(0.7, dtype=torch.float64), torch.tensor([-0.3, 0.5, 0.2], dtype=torch.float64)
    x = torch.randn(2_000_000, 3, generator=draw, dtype=torch.float64)
    sampled = 0.5 * (a * torch.relu(x @ w) - torch.relu(x[:, 0])).square().mean()
    assert float(loss(a, w)) == pytest.approx(float(sampled), abs=1e-3)


def test_one_step_of_the_flow_is_the_gradient_of_the_closed_form():
    a = torch.tensor([0.7, -0.4], dtype=torch.float64)
    w = torch.tensor([[-0.3, 0.5, 0.2], [0.4, 0.1, -0.6]], dtype=torch.float64)
    after_a, after_w = neuron_flow(a, w, steps=1, rate=1e-3)
    for index in range(2):
        one_a, one_w = a[index].clone().requires_grad_(), w[index].clone().requires_grad_()
        grad_a, grad_w = torch.autograd.grad(loss(one_a, one_w), (one_a, one_w))
        assert float((a[index] - after_a[index]) / 1e-3) == pytest.approx(float(grad_a), rel=1e-6)
        assert torch.allclose((w[index] - after_w[index]) / 1e-3, grad_w, rtol=1e-6)


def test_balance_is_conserved_along_the_flow():
    w = torch.randn(20, 4, dtype=torch.float64)
    w = 0.5 * w / w.norm(dim=1, keepdim=True)
    a = 0.5 * torch.ones(20, dtype=torch.float64)
    a[10:] *= -1
    after_a, after_w = neuron_flow(a, w, steps=2000, rate=0.005)
    assert torch.allclose(after_a**2, after_w.norm(dim=1) ** 2, atol=5e-3)
    assert torch.equal(after_a.sign(), a.sign())


def test_sign_flips_are_counted_among_survivors():
    net = nn.Linear(4, 1, bias=False)
    net.weight.data = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    start = {"weight": torch.tensor([[1.0, 2.0, -3.0, 4.0]])}
    masks.attach(net, {"weight": torch.tensor([[True, True, True, False]])})
    assert sign_flips(net, start) == pytest.approx(2 / 3)


def test_perturbed_signs_keep_magnitudes_and_the_original():
    net = nn.Linear(100, 100)
    before = net.weight.detach().clone()
    hurt = perturb_signs(net, share=0.2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(net.weight, before)
    assert torch.equal(hurt.weight.abs(), before.abs())
    assert float((hurt.weight != before).double().mean()) == pytest.approx(0.2, abs=0.02)


def test_pruned_inputs_stay_pruned_along_the_flow():
    a, w = torch.tensor([0.5], dtype=torch.float64), torch.tensor([[0.1, 0.4]], dtype=torch.float64)
    kept = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    _, after = neuron_flow(a, w, kept=kept, steps=50)
    assert after[0, 0] == 0
    assert after[0, 1] != 0.4
