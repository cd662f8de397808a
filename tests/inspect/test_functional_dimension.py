"""Functional dimension against closed forms, exact ranks in rational numbers and autograd."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn

from nervure import zoo
from nervure._kit import UsageError
from nervure.core.forward import outputs, take, tree_map
from nervure.core.jacobian import Engine
from nervure.inspect import local_dimension
from nervure.inspect.functional_dimension import _jacobian, _wide


def _batch(n, width, *, seed=0, scale=1.0):
    return scale * torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), torch.zeros(n)


def _one_hidden(activation, *, inputs=3, width=4, out=2, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, width), activation, nn.Linear(width, out)).double()


def test_known_ranks():
    # A generic ReLU layer loses one direction a unit; tanh none; a dead unit all of its parameters.
    assert local_dimension(_one_hidden(nn.Tanh()), _batch(300, 3)).dimension == 4 * 4 + 4 * 2 + 2
    relu = local_dimension(_one_hidden(nn.ReLU()), _batch(300, 3, scale=3.0), symmetries=4)
    assert (relu.dimension, relu.deficit, relu.verdict) == (26 - 4, 0, "ok")
    dead = _one_hidden(nn.ReLU())
    dead[0].bias.data[1] = -1e3
    found = local_dimension(dead, _batch(300, 3, scale=3.0), symmetries=4)
    assert found.dimension == 26 - 3 - (3 + 1 + 2)
    assert found.silent == {"0.weight": 3, "0.bias": 1, "2.weight": 2}
    assert found.verdict == "warn"
    linear = local_dimension(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3)).double(), _batch(50, 3))
    assert linear.dimension == 2 * (3 + 3 - 2) + 3  # matrices of rank two, and the bias


def _rational_rank(rows):
    rows, rank = [[Fraction(v) for v in row] for row in rows], 0
    for column in range(len(rows[0])):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for i in range(rank + 1, len(rows)):
            factor = rows[i][column] / rows[rank][column]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[rank], strict=True)]
        rank += 1
    return rank


def test_exact_rank_of_a_3_2_1_network_in_rational_numbers():
    draw = torch.Generator().manual_seed(3)
    for _ in range(5):
        w = torch.randint(-3, 4, (2, 3), generator=draw)
        b, v = torch.randint(-3, 4, (2,), generator=draw), torch.randint(-3, 4, (2,), generator=draw)
        x = torch.randint(-4, 5, (60, 3), generator=draw)
        model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)).double()
        for value, given in zip(model.parameters(), (w, b, v[None], torch.zeros(1)), strict=True):
            value.data.copy_(given)
        rows = []
        for point in x.tolist():
            units = zip(w.tolist(), b.tolist(), strict=True)
            h = [sum(a * c for a, c in zip(unit, point, strict=True)) + bias for unit, bias in units]
            on = [int(one > 0) for one in h]
            rows.append(
                [int(v[j]) * on[j] * c for j in range(2) for c in point]
                + [int(v[j]) * on[j] for j in range(2)]
                + [max(one, 0) for one in h]
                + [1]
            )
        assert local_dimension(model, (x.double(), torch.zeros(60))).dimension == _rational_rank(rows)


def test_too_few_inputs_cannot_tell():
    found = local_dimension(_one_hidden(nn.Tanh()), _batch(8, 3))
    assert found.dimension == 16 == found.rows
    assert found.half < found.dimension
    assert found.verdict == "cannot tell"


def test_a_large_network_is_only_looked_at_for_silent_parameters():
    model = nn.Sequential(nn.Linear(3, 300), nn.ReLU(), nn.Linear(300, 2))
    model[2].weight.data[:, 7] = 0
    found = local_dimension(model, _batch(20, 3, scale=3.0))
    assert found.dimension is None
    assert found.deficit is None
    assert found.silent["0.bias"] >= 1
    small = local_dimension(model, _batch(20, 3, scale=3.0), most=10_000)
    assert (small.silent, small.rows) == (found.silent, found.rows)
    with pytest.raises(UsageError, match="out of range"):
        local_dimension(model, _batch(20, 3), most=0)


@pytest.mark.parametrize("name", zoo.names())
def test_the_jacobian_of_every_zoo_model_is_that_of_autograd(name):
    case = zoo.case(name)
    model = copy.deepcopy(case.model(seed=0)).eval().double()
    inputs, _ = case.batch(3, seed=0)
    inputs = take(tree_map(_wide, inputs), slice(0, 2))
    engine = Engine(model, inputs)
    found = _jacobian(engine, inputs)
    flat = outputs(model, inputs).flatten()
    for row in (0, len(flat) // 2, len(flat) - 1):
        truth = torch.autograd.grad(flat[row], list(engine.chosen.values()), retain_graph=True, allow_unused=True)
        for (key, value), gradient in zip(engine.chosen.items(), truth, strict=True):
            wanted = torch.zeros_like(value) if gradient is None else gradient
            torch.testing.assert_close(found[key][row], wanted.flatten(), rtol=1e-8, atol=1e-11)
