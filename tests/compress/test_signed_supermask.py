"""Signed supermasks against plain ternary networks, autograd and quadrature."""

import copy

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import nn

from nervure import zoo
from nervure._kit import BadData, Unsupported, UsageError
from nervure.compress import pack_ternary, signed_supermask_, supermask, unpack_ternary
from nervure.core import forward


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.ELU(), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3)
    )


def test_forward_is_that_of_a_plain_ternary_network():
    model, x = signed_supermask_(net(), tau=0.05).eval(), torch.randn(7, 6)
    plain = net().eval()
    with torch.no_grad():
        for (_, mask, scores), layer in zip(supermask.on(model), (plain[1], plain[5]), strict=True):
            e = torch.where(scores > 0.05, 1.0, torch.where(scores < -0.05, -1.0, 0.0))
            layer.weight.copy_(mask.frozen * e)
            layer.bias.zero_()
    assert torch.equal(model(x), plain(x))
    twin = supermask.freeze_(copy.deepcopy(model))
    assert torch.equal(twin(x), plain(x))
    assert {name for name, _ in twin.named_parameters()} == {name for name, _ in plain.named_parameters()}


def test_the_scores_gradient_is_the_weights_times_the_frozen_weight():
    model, x = signed_supermask_(net()), torch.randn(7, 6)
    name, mask, scores = next(iter(supermask.on(model)))
    seen = {}
    handle = model[1].register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    out = model[1](x.unsqueeze(1))
    handle.remove()
    target = torch.randn_like(out)
    (out * target).sum().backward()
    weight = model[1].weight.detach().requires_grad_()
    (nn.functional.conv1d(seen["x"], weight) * target).sum().backward()
    torch.testing.assert_close(scores.grad, weight.grad * mask.frozen)
    assert name == "1"


def test_only_scores_are_trained_and_frozen_weights_never_move():
    model = signed_supermask_(net())
    frozen = [mask.frozen.clone() for _, mask, _ in supermask.on(model)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, weight_decay=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(mask.frozen, kept) for (_, mask, _), kept in zip(supermask.on(model), frozen, strict=True))
    assert bool((model[1].bias == 0).all())
    assert bool((model[3].weight == 1).all())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"{place}.parametrizations.weight.original" for place in (1, 5)
    ]


def test_the_moment_of_elu_is_its_integral():
    def density(x):
        elu = x if x > 0 else np.expm1(x)
        return elu**2 * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)

    assert pytest.approx(integrate.quad(density, -10, 10)[0], abs=1e-4) == supermask.ELU_SECOND_MOMENT


@pytest.mark.parametrize("case", zoo.cases(), ids=lambda case: case.name)
def test_the_zoo_runs_or_is_refused_with_a_reason(case):
    model, (inputs, _) = case.model(seed=0), case.batch(4, seed=0)
    before = forward.outputs(case.model(seed=0).eval(), inputs).shape
    if case.name in ("encoder", "lstm", "gru", "tied-lm", "raw-parameter"):
        with pytest.raises(Unsupported, match="belongs to no linear|is tied"):
            signed_supermask_(model)
        return
    signed_supermask_(model)
    assert forward.outputs(model.eval(), inputs).shape == before
    case.loss(model, case.batch(4, seed=0)).backward()
    assert all(scores.grad is not None for _, _, scores in supermask.on(model))


def test_state_and_copies():
    model = signed_supermask_(net(), seed=1).eval()
    again = signed_supermask_(net(), seed=2).eval()
    again.load_state_dict(model.state_dict())
    x = torch.randn(5, 6)
    assert torch.equal(again(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_packing_is_exact_and_two_bits_a_weight():
    weight = signed_supermask_(net())[5].weight.detach()
    packed, scale = pack_ternary(weight)
    assert packed.numel() == weight.numel() // 4
    assert torch.equal(unpack_ternary(packed, scale, shape=weight.shape), weight)
    with pytest.raises(BadData, match="not ternary"):
        pack_ternary(torch.tensor([0.1, 0.2]))
    with pytest.raises(UsageError, match="negative width"):
        signed_supermask_(net(), tau=-1)
    with pytest.raises(Unsupported, match="no trainable linear"):
        signed_supermask_(nn.ReLU())
