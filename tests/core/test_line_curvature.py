"""The gap between loss and chord against the exact identity with Hessian-vector products, in float64."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from torch import nn

from nervure import zoo
from nervure._kit import UsageError
from nervure.core.connectivity import line
from nervure.core.line_curvature import curvature_gaps, mean_loss


def problem():
    torch.manual_seed(0)
    ends = [
        nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 4)).double()
        for _ in range(2)
    ]
    assert 500 <= sum(value.numel() for value in ends[0].parameters()) < 600
    return (*ends, (3 * torch.randn(64, 10, dtype=torch.float64), torch.randint(4, (64,))))


@pytest.mark.parametrize("parameters", [None, ["2"], ["0.weight", "4"]])
def test_the_gap_is_the_integral_of_the_curvature(parameters):
    first, second, batch = problem()
    found = line(first, second, mean_loss([batch], F.cross_entropy), shares=11, parameters=parameters)
    gaps = curvature_gaps(first, second, batch, nodes=40, points=11, parameters=parameters)
    np.testing.assert_allclose(gaps.numpy(), found.gaps.numpy(), rtol=0, atol=1e-7)
    assert float(found.gaps.abs().max()) > 1e-3


def test_the_gap_at_one_place_against_quadrature_of_a_dense_hessian():
    """-integral of G(t, s) d'H d with Green's function written out, and d'H d by a second difference of the loss."""
    first, second, batch = problem()
    start = torch.cat([value.detach().flatten() for value in first.parameters()])
    step = torch.cat([value.detach().flatten() for value in second.parameters()]) - start
    names = [name for name, _ in first.named_parameters()]
    sizes = [value.shape for value in first.parameters()]

    def loss(vector):
        parts = torch.split(vector, [size.numel() for size in sizes])
        held = {name: part.view(size) for name, part, size in zip(names, parts, sizes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(first, held, (batch[0],)), batch[1])

    def bend(s):
        return float(step @ torch.autograd.functional.hvp(loss, start + s * step, step)[1])

    t = 0.3
    green = sum(
        quad(lambda s: min(t, s) * (1 - max(t, s)) * bend(s), low, high, epsabs=1e-9)[0]
        for low, high in ((0, t), (t, 1))
    )
    found = curvature_gaps(first, second, batch, nodes=24, points=11)
    assert found[3].item() == pytest.approx(-green, abs=1e-6)
    assert float(loss(start + t * step) - (1 - t) * loss(start) - t * loss(start + step)) == pytest.approx(
        -green, abs=1e-6
    )


def test_one_node_is_the_second_order_estimate():
    first, second, batch = problem()
    middle = copy.deepcopy(first)
    with torch.no_grad():
        for value, other in zip(middle.parameters(), second.parameters(), strict=True):
            value.lerp_(other, 0.5)
    step = [b.detach() - a.detach() for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    gradient = torch.autograd.grad(
        F.cross_entropy(middle(batch[0]), batch[1]), list(middle.parameters()), create_graph=True
    )
    along = sum((g * d).sum() for g, d in zip(gradient, step, strict=True))
    bend = sum((h * d).sum() for h, d in zip(torch.autograd.grad(along, list(middle.parameters())), step, strict=True))
    found = curvature_gaps(first, second, batch, nodes=1, points=5)
    expected = [-t * (1 - t) / 2 * float(bend) for t in (0, 0.25, 0.5, 0.75, 1)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_batches_are_weighted_by_their_samples_and_frozen_layers_move_too():
    first, second, (x, y) = problem()
    first[0].weight.requires_grad_(False)
    whole = curvature_gaps(first, second, (x, y), nodes=3)
    parts = curvature_gaps(first, second, [(x[:10], y[:10]), (x[10:], y[10:])], nodes=3)
    torch.testing.assert_close(whole, parts)
    assert not first[0].weight.requires_grad
    measure = mean_loss([(x[:10], y[:10]), (x[10:], y[10:])], F.cross_entropy)
    assert measure(first) == pytest.approx(float(F.cross_entropy(first(x), y).detach()))


@pytest.mark.parametrize("name", zoo.names())
def test_every_zoo_model_is_left_alone(name):
    case = zoo.case(name)
    first, second = case.model(seed=0), case.model(seed=1)
    before = copy.deepcopy(first.state_dict())
    x, y = case.batch(4)
    found = curvature_gaps(
        first, second, (x, y), nodes=1, points=3, loss=lambda out, y: F.cross_entropy(out.flatten(0, -2), y.flatten())
    )
    assert found.isfinite().all()
    assert all(torch.equal(before[key], value) for key, value in first.state_dict().items())
    assert first.training


def test_no_node_is_told():
    first, second, batch = problem()
    with pytest.raises(UsageError, match="measured somewhere"):
        curvature_gaps(first, second, batch, nodes=0)
