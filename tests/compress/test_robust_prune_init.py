import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from nervure import zoo
from nervure.compress import SbpSr, Snip
from nervure.compress.robust_prune_init import DeepMLP, rescale
from nervure.core import forward, masks, modules, scores
from nervure.spec import Budget
from nervure.testing import ToyTask, toy_task


@pytest.mark.parametrize("name", ["mlp", "residual-conv", "depthwise", "vit", "lstm", "tied-lm", "dict-tuple"])
def test_scores_are_the_gradient_of_a_gate_at_one(name):
    entry = zoo.case(name)
    model = entry.model().double()
    inputs, targets = entry.batch(4)
    inputs = forward.tree_map(lambda t: t.double() if t.is_floating_point() else t, inputs)
    weights = modules.weights(model)
    found = scores.sensitivity(model, entry.loss, [(inputs, targets)], weights)
    model.train()
    gates = {key: torch.ones_like(weight, requires_grad=True) for key, weight in weights.items()}

    def gated(*args, **kwargs):
        values = {key: weight.detach() * gates[key] for key, weight in weights.items()}
        return functional_call(model, values, args, kwargs, tie_weights=True)

    with scores.kept_buffers(model):
        gradients = torch.autograd.grad(entry.loss(gated, (inputs, targets)), list(gates.values()), allow_unused=True)
    for key, gradient in zip(gates, gradients, strict=True):
        expected = torch.zeros_like(weights[key]) if gradient is None else gradient.abs()
        assert torch.allclose(found[key], expected, rtol=1e-9, atol=1e-15)


def test_scores_leave_statistics_and_gradients_alone():
    entry = zoo.case("residual-conv")
    model, batch = entry.model(), entry.batch(8)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    scores.sensitivity(model, entry.loss, [batch], modules.weights(model))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("sigma_w", "sigma_b"), [(math.sqrt(2), 0.0), (1.0, 0.5), (1.2, 0.2)])
def test_forward_powers_follow_the_mean_field_recursion(sigma_w, sigma_b):
    torch.manual_seed(1)
    x = torch.randn(4, 500)
    model = DeepMLP(500, 8, 3, sigma_w=sigma_w, sigma_b=sigma_b, width=2000)
    found = torch.stack([model.powers(x[i : i + 1]) for i in range(4)])
    power = sigma_w**2 * x.square().mean(1) + sigma_b**2
    for layer in range(8):
        assert torch.allclose(found[:, layer], power, rtol=0.12)
        # For ReLU the next power is sigma_w^2 q / 2 + sigma_b^2; taken from the measured one, errors do not add up.
        power = sigma_w**2 * found[:, layer] / 2 + sigma_b**2


def test_one_layer_meets_the_recursion_to_a_percent():
    torch.manual_seed(0)
    x = torch.randn(1, 20)
    draws = []
    for _ in range(100):  # one draw scatters by sqrt(5 / 2000), five percent
        first, second = DeepMLP(20, 2, 2, width=2000).powers(x)
        draws.append(second / first)
    assert float(torch.stack(draws).mean()) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("name", ["mlp", "lenet", "depthwise"])
def test_rescaling_reaches_the_target_in_every_layer(name):
    entry = zoo.case(name)
    model = entry.model()
    draw = torch.Generator().manual_seed(0)
    masks.attach(model, {n: torch.rand(w.shape, generator=draw) < 0.3 for n, w in modules.weights(model).items()})
    factors = rescale(model, gain=1.5)
    for key in factors:
        weight = model.get_parameter(key).detach()
        assert float(weight.square().mean()) * weight[0].numel() == pytest.approx(1.5**2, rel=1e-5)


def test_a_layer_without_weights_is_left_alone():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    masks.attach(net, {"0.weight": torch.zeros(4, 4, dtype=torch.bool), "1.weight": torch.ones(2, 4, dtype=torch.bool)})
    assert list(rescale(net)) == ["1.weight"]
    assert torch.isfinite(net(torch.ones(1, 4))).all()


def test_snip_keeps_the_largest_scores_of_the_whole_network():
    net, task = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), toy_task()
    result = Snip().fit(net, task, Budget(target=0.25, steps=0), seed=0)
    found = scores.sensitivity(net, task.loss, task.batches(1), modules.weights(net))
    flat = torch.cat([score.reshape(-1) for score in found.values()])
    kept = torch.cat([mask.reshape(-1) for mask in result.masks.values()])
    assert flat[kept].min() >= flat[~kept].max()
    assert int(kept.sum()) == round(0.25 * len(flat))


def test_nan_scores_are_refused():
    from nervure._kit import BadData

    task = ToyTask(torch.full((4, 8), float("nan")), torch.zeros(4, dtype=torch.long))
    with pytest.raises(BadData, match="scores contain NaN"):
        SbpSr().fit(nn.Sequential(nn.Linear(8, 4)), task, Budget(target=0.5), seed=0)
