"""Geometry on hand-built points: perfect hypercubes, random points, exclusive or; parallelism by a plain loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from nervure import zoo
from nervure._kit import BadData
from nervure.core.features import features, samples
from nervure.inspect._geometry_trial import Committee, fit, latent_patterns
from nervure.inspect.tanh_relu_geometry import (
    cross_condition,
    parallelism,
    representation_geometry,
    with_activation,
)


def _cube(repeats, bits=3):
    return torch.cartesian_prod(*[torch.arange(2)] * bits).repeat(repeats, 1)


def test_a_perfect_hypercube_is_parallel_and_generalises():
    bits = _cube(10)
    draw = torch.Generator().manual_seed(0)
    rows = bits.double() @ torch.randn(3, 20, generator=draw).double()
    for factor in range(3):
        assert parallelism(rows, bits, factor) == pytest.approx(1)
        assert cross_condition(rows + 0.01 * torch.randn(rows.shape, generator=draw), bits, factor) == 1


def test_random_points_are_neither():
    draw = torch.Generator().manual_seed(1)
    bits = _cube(4, bits=5)
    place = bits @ (2 ** torch.arange(5))
    rows = torch.randn(32, 4000, generator=draw).double()[place]
    for factor in range(5):
        # Two moves of independent points have cosine 0, with deviation (2 / (F pairs))^0.5 or less.
        assert abs(parallelism(rows, bits, factor)) < 0.02
        assert abs(cross_condition(rows, bits, factor) - 0.5) < 0.2


def test_parallelism_by_a_plain_loop():
    draw = torch.Generator().manual_seed(2)
    bits = _cube(7)[torch.randperm(56, generator=draw)]
    rows = torch.randn(56, 6, generator=draw).double() + bits[:, :1]
    for factor in range(3):
        moves = []
        for others in itertools.product((0, 1), repeat=2):
            sides = []
            for value in (0, 1):
                wanted = list(others)
                wanted.insert(factor, value)
                sides.append(rows[(bits == torch.tensor(wanted)).all(1)].mean(0).numpy())
            moves.append((sides[1] - sides[0]) / np.linalg.norm(sides[1] - sides[0]))
        truth = np.mean([one @ two for one, two in itertools.combinations(moves, 2)])
        assert parallelism(rows, bits, factor) == pytest.approx(truth, abs=1e-12)


def test_a_layer_that_holds_one_factor_alone():
    bits = _cube(20)
    z = 2.0 * bits - 1
    draw = torch.Generator().manual_seed(3)
    order = torch.randperm(len(z), generator=draw)
    x = z[order] + 0.01 * torch.randn(z.shape, generator=draw)
    model = nn.Linear(3, 1, bias=False)
    model.weight.data.copy_(torch.tensor([[1.0, 0, 0]]))
    found = representation_geometry(nn.Sequential(model), x, z[order], layers=["0"])["0"]
    assert found.factor_alignment[0] == pytest.approx(1, abs=1e-3)
    assert found.factor_alignment[1] < 1e-3
    assert found.decoding[0] == 1
    assert found.decoding[1] < 0.75
    assert found.cross_condition[0] == 1
    rows = x[:, :1].double()
    k, m = (one - one.mean(0) for one in (rows, x.double()))
    k, m = (one @ one.T for one in (k, m))
    assert found.input_alignment == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())), rel=1e-6)


@pytest.mark.parametrize("name", ["residual-conv", "gru", "dict-tuple"])
def test_layers_of_any_network(name):
    case = zoo.case(name)
    model, (inputs, _) = case.model(seed=0), case.batch(32, seed=0)
    layer = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bits = _cube(8, bits=2)
    found = representation_geometry(model, inputs, bits, layers=[layer])[layer]
    rows = samples(features(model, inputs, [layer])[layer])
    assert found.parallelism[0] == pytest.approx(parallelism(rows, bits, 0))
    assert (found.input_alignment is None) == (not isinstance(inputs, torch.Tensor))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("factors", "reason"),
    [
        (torch.arange(2).repeat(8)[:, None], "too few factors"),
        (torch.arange(16)[:, None].expand(16, 2) % 3, "not binary"),
        (torch.arange(2).repeat(8)[:, None].expand(16, 2), "combinations of factors are missing"),
        (_cube(2), None),
        (_cube(1), "combinations of factors are missing"),
        (_cube(3), "no row for each sample"),
    ],
)
def test_refusals(factors, reason):
    model, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(16, 3)
    if reason is None:
        assert list(representation_geometry(model, x, factors, layers=["0"])) == ["0"]
        return
    with pytest.raises(BadData, match=reason):
        representation_geometry(model, x, factors, layers=["0"])


def test_activations_are_swapped_in_a_copy():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    twin = with_activation(model, nn.ReLU, nn.Tanh)
    assert isinstance(model[1], nn.ReLU)
    assert isinstance(twin[1], nn.Tanh)
    assert isinstance(twin[2][1], nn.Tanh)
    torch.testing.assert_close(twin[0].weight, model[0].weight)


def test_the_trial_learns_a_bit():
    source = latent_patterns(64, torch.Generator().manual_seed(0), bits=2, width=10, noise=0.1)
    x, bits = source()
    assert x.shape == (64, 10)
    assert set(bits.unique().tolist()) == {-1.0, 1.0}
    model = Committee(10, 20, nn.Tanh(), torch.Generator().manual_seed(1))
    signs = model.signs.clone()
    fit(model, source, lambda some: some[:, 0], steps=800)
    x, bits = source()
    assert float((model(x).sign() == bits[:, 0]).double().mean()) > 0.95
    assert torch.equal(model.signs, signs)
    assert float(signs.sum()) == 0
