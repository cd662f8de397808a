"""SIREN against the formula by hand, the arcsine law, and finite differences in float64."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from nervure import zoo
from nervure._kit import Unsupported, UsageError
from nervure.core import masks
from nervure.core.fields import Gradient, Laplacian, gradient, laplacian
from nervure.learn import Loop
from nervure.nn.sine_graph import Sine, initialise_
from nervure.nn.siren import (
    SineLayer,
    Siren,
    reinitialise_,
    sine,
    sine_,
)


def by_hand(net: Siren, x: torch.Tensor, omegas: list[float]) -> torch.Tensor:
    state = net.state_dict()
    for index, omega in enumerate(omegas):
        x = torch.sin(omega * (x @ state[f"layers.{index}.linear.weight"].T + state[f"layers.{index}.linear.bias"]))
    return x @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("omega", [30.0, (30.0, 12.0, 5.0)])
def test_forward_is_the_formula(omega):
    net = Siren(2, 3, hidden=16, layers=3, omega_0=omega).double()
    x = torch.rand(7, 2, dtype=torch.float64)
    omegas = [30.0] * 3 if isinstance(omega, float) else list(omega)
    torch.testing.assert_close(net(x), by_hand(net, x, omegas), rtol=0, atol=1e-12)


@pytest.mark.parametrize("fan_in", [1, 3, 64, 257])
def test_bounds_of_the_weights(fan_in):
    first = SineLayer(fan_in, 20_000 // fan_in + 400, first=True, omega_0=20.0).linear
    later = SineLayer(fan_in, 20_000 // fan_in + 400, omega_0=20.0).linear
    for layer, bound in ((first, 1 / fan_in), (later, math.sqrt(6 / fan_in) / 20)):
        ratio = (layer.weight.detach().flatten() / bound).numpy()
        assert abs(ratio).max() <= 1 + 1e-6
        assert stats.kstest(ratio, stats.uniform(-1, 2).cdf).pvalue > 1e-3
        assert float(layer.bias.detach().abs().max()) <= bound * (1 + 1e-6)


def test_weights_times_arcsine_inputs_are_standard_normal():
    draw = np.random.default_rng(0)
    rows, fan_in, omega = 1_000_000, 32, 30.0
    layer = initialise_(nn.Linear(fan_in, rows, bias=False), omega=omega, first=False)
    x = np.sin(draw.uniform(-np.pi, np.pi, (rows, fan_in)).astype(np.float32))
    pre = omega * (layer.weight.detach().numpy() * x).sum(1, dtype=np.float64)
    assert abs(pre.std() - 1) < 0.004
    assert stats.kstest(pre, "norm").pvalue > 1e-3
    # The law is that of this variance alone: two per cent more is noticed.
    assert stats.kstest(pre * 1.02, "norm").pvalue < 1e-6


def test_sine_of_a_uniform_phase_follows_the_arcsine_law():
    phase = torch.rand(1_000_000, dtype=torch.float64) * 2 - 1
    values = Sine(2 * math.pi)(phase).numpy()
    assert stats.kstest(values, stats.arcsine(-1, 2).cdf).pvalue > 1e-3


def test_spread_in_depth_is_the_root_of_the_variance_map():
    """Without biases v = 1 - exp(-2v): 0.7968, a deviation of 0.893; torch's own weights leave it at once."""
    root = 0.5
    for _ in range(200):
        root = 1 - math.exp(-2 * root)
    net = Siren(2, 1, hidden=512, layers=11)
    x, spreads = torch.rand(500, 2) * 2 - 1, []
    with torch.no_grad():
        for layer in net.layers:
            if not layer.first:
                layer.linear.bias.zero_()
            spreads.append(float(30 * layer.linear(x).std()))
            x = layer(x)
    assert spreads[-1] == pytest.approx(math.sqrt(root), rel=0.03)


def central(function, x, i, h):
    step = torch.zeros_like(x)
    step[:, i] = h
    return (function(x + step) - function(x - step)) / (2 * h)


def second(function, x, i, h):
    step = torch.zeros_like(x)
    step[:, i] = h
    return (function(x + step) - 2 * function(x) + function(x - step)) / h**2


def test_derivatives_equal_central_differences():
    net = Siren(3, 2, hidden=12, layers=2, omega_0=3.0).double()
    x = torch.rand(9, 3, dtype=torch.float64)
    with torch.no_grad():
        slopes = torch.stack([central(net, x, i, 1e-5) for i in range(3)], -1)
        bend = sum(
            # Richardson: two steps cancel the h^2 error.
            (4 * second(net, x, i, 5e-4) - second(net, x, i, 1e-3)) / 3
            for i in range(3)
        )
        assert float((gradient(net, x) - slopes).detach().abs().max()) < 1e-6
        assert float((laplacian(net, x) - bend).abs().max()) < 1e-6 * max(1, float(bend.abs().max()))


def test_derivatives_of_closed_forms():
    x = torch.rand(5, 2, dtype=torch.float64)
    field = lambda p: torch.stack([p[:, 0] ** 2 * p[:, 1], p[:, 0] + 3 * p[:, 1] ** 3], 1)  # noqa: E731
    wanted = torch.stack(
        [
            torch.stack([2 * x[:, 0] * x[:, 1], x[:, 0] ** 2], 1),
            torch.stack([torch.ones(5, dtype=x.dtype), 9 * x[:, 1] ** 2], 1),
        ],
        1,
    )
    torch.testing.assert_close(gradient(field, x), wanted)
    torch.testing.assert_close(laplacian(field, x), torch.stack([2 * x[:, 1], 18 * x[:, 1]], 1))
    relu = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    assert float(laplacian(relu, x).detach().abs().max()) == 0.0
    linear = nn.Linear(2, 1).double()
    assert float(laplacian(linear, x).detach().abs().max()) == 0.0


def test_gradient_of_weights_through_the_laplacian():
    net = Siren(2, 1, hidden=4, layers=1, omega_0=2.0).double()
    x = torch.rand(3, 2, dtype=torch.float64)
    parameters = dict(net.named_parameters())

    def loss(*values):
        return torch.func.functional_call(
            _Loss(net), {f"net.{k}": v for k, v in zip(parameters, values, strict=True)}, (x,)
        )

    assert torch.autograd.gradcheck(loss, tuple(parameters.values()))


class _Loss(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return laplacian(self.net, x).pow(2).sum()


def test_no_grad_callers_get_detached_derivatives():
    net = Siren(2, 1, hidden=8, layers=1)
    with torch.no_grad():
        found = laplacian(net, torch.rand(4, 2)), gradient(net, torch.rand(4, 2))
    assert not any(value.requires_grad for value in found)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(("wrap", "reference"), [(Gradient, gradient), (Laplacian, laplacian)])
def test_a_plain_loop_fits_derivatives(wrap, reference):
    field = lambda p: (3 * p[:, :1]).sin() * (2 * p[:, 1:]).cos()  # noqa: E731
    x = torch.rand(256, 2) * 2 - 1
    target = reference(field, x).detach()
    net = wrap(Siren(2, 1, hidden=32, layers=2, omega_0=5.0))
    before = float(F.mse_loss(net(x).detach(), target))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    Loop(net, optimizer, (x, target), loss=F.mse_loss, batch_size=256).run(150)
    assert float(F.mse_loss(net(x).detach(), target)) < 0.05 * before


class Shared(nn.Module):
    """One activation module at every place, a coordinate skip, Dropout, and a squashed output."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(10, 8)])
        self.head = nn.Linear(8, 1)
        self.act, self.out, self.drop = nn.ReLU(inplace=True), nn.Sigmoid(), nn.Dropout(0.5)

    def forward(self, x):
        h = self.act(self.layers[0](2 * x - 1))
        h = self.drop(self.act(self.layers[1](h)))
        h = self.act(self.layers[2](torch.cat([h, x], -1)))
        return self.out(self.head(h)).squeeze(-1)


def test_sine_converts_shared_activations_and_skips():
    net = sine_(Shared(), omega_0=20.0)
    assert isinstance(net.act, Sine)
    assert isinstance(net.out, nn.Sigmoid)
    for layer, bound in zip(
        [*net.layers, net.head], [1 / 2, *(math.sqrt(6 / n) / 20 for n in (8, 10, 8))], strict=True
    ):
        assert 0.6 * bound < float(layer.weight.detach().abs().max()) <= bound * (1 + 1e-6)
    assert net(torch.rand(4, 2)).shape == (4,)


def test_sine_copies_a_functional_mlp_and_leaves_it_alone():
    model = zoo.case("mlp").model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Unsupported, match="function"):
        sine_(model)
    made = sine(model, omega_0=10.0, generator=torch.Generator().manual_seed(1))
    again = sine(model, omega_0=10.0, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert list(made.state_dict()) == list(before)
    inputs, _ = zoo.case("mlp").batch(4)
    torch.testing.assert_close(made(inputs), again(inputs), rtol=0, atol=0)
    x = inputs.flatten(1)
    for layer in model.layers:
        x = torch.sin(10 * F.linear(x, *made.get_submodule(f"layers.{list(model.layers).index(layer)}").parameters()))
    torch.testing.assert_close(made(inputs), made.head(x))


def test_an_activation_on_the_output_too_is_refused():
    act = nn.Tanh()
    with pytest.raises(Unsupported, match="output"):
        sine_(nn.Sequential(nn.Linear(2, 4), act, nn.Linear(4, 1), act))
    made = sine(nn.Sequential(nn.Linear(2, 4), act, nn.Linear(4, 1), act))
    assert float(made(torch.rand(9, 2)).detach().abs().max()) < 1


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)),
        nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)),
        nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 1)),
        nn.Sequential(nn.Linear(2, 4), nn.Softmax(-1), nn.Linear(4, 1)),
        nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1)),
        nn.Sequential(nn.Linear(2, 4), nn.ReLU()),
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 4)), nn.ReLU(), nn.Linear(4, 1)),
    ],
    ids=["norm", "two-linear", "two-activations", "softmax", "conv", "no-head", "weight-norm"],
)
def test_what_is_no_mlp_is_refused_and_left_alone(model):
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    for convert in (sine_, sine):
        with pytest.raises(Unsupported):
            convert(model)
    assert kinds == [type(module) for module in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", zoo.names())
def test_on_the_zoo_it_converts_or_refuses(name):
    case = zoo.case(name)
    model = case.model()
    if name in ("mlp", "lenet-300-100", "twice-used"):
        loss = case.loss(sine(model), case.batch())
        assert torch.isfinite(loss)
    else:
        with pytest.raises(Unsupported):
            sine(model)


def test_a_weight_wanted_at_two_places_is_refused():
    shared = nn.Linear(4, 4)
    with pytest.raises(Unsupported, match="two places"):
        sine_(nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 1)))


def test_reinitialise_follows_surgery_and_masks():
    net = Siren(2, 1, hidden=16, layers=2)
    net.layers[0].linear, net.layers[1].linear = nn.Linear(2, 200), nn.Linear(200, 16)
    reinitialise_(net)
    bound = math.sqrt(6 / 200) / 30
    assert 0.9 * bound < float(net.layers[1].linear.weight.detach().abs().max()) <= bound * (1 + 1e-6)
    mask = torch.zeros(16, 200, dtype=torch.bool)
    mask[:, :5] = True
    masks.attach(net, {"layers.1.linear.weight": mask})
    reinitialise_(net)
    weight = net.layers[1].linear.weight.detach()
    assert float(weight[:, 5:].abs().max()) == 0
    assert math.sqrt(6 / 200) / 30 < float(weight.detach().abs().max()) <= math.sqrt(6 / 5) / 30 * (1 + 1e-6)
    with pytest.raises(Unsupported, match="no sine"):
        reinitialise_(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)))


def test_wrong_frequencies_are_refused():
    with pytest.raises(UsageError):
        Siren(2, 1, layers=3, omega_0=(30.0, 30.0))
    with pytest.raises(UsageError):
        SineLayer(2, 3, omega_0=0.0)
    with pytest.raises(UsageError):
        Siren(2, 1, layers=0)
