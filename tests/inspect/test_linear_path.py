"""Paths from start to solution against parabolas and rises counted by hand."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nervure.core.line_curvature import mean_loss
from nervure.inspect.linear_path import StraightPath, straight_path


def problem(seed=0):
    torch.manual_seed(seed)
    start, end = (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double() for _ in range(2))
    return start, end, (torch.randn(40, 4, dtype=torch.float64), torch.randint(3, (40,)))


def test_a_quadratic_gives_the_exact_parabola_before_between_and_beyond():
    torch.manual_seed(0)
    start, end = (nn.Linear(3, 2).double() for _ in range(2))
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    found = straight_path(end, (x, y), start=start, loss=F.mse_loss, points=11, beyond=0.3).train
    assert found.shares[0].item() == pytest.approx(-0.3)
    assert found.shares[-1].item() == pytest.approx(1.3)
    assert len(found.shares) == 17
    ends = [float(F.mse_loss(one(x), y).detach()) for one in (start, end)]
    middle = (start(x) + end(x)).detach() / 2
    half = float(F.mse_loss(middle, y))
    curve = 2 * ends[0] + 2 * ends[1] - 4 * half  # the second coefficient of the parabola through three points
    for share, value in zip(found.shares.tolist(), found.losses.tolist(), strict=True):
        expected = ends[0] + share * (ends[1] - ends[0]) - curve * share * (1 - share)
        assert value == pytest.approx(expected, rel=1e-10)


def test_ends_are_direct_evaluation_bit_for_bit():
    start, end, batch = problem()
    found = straight_path(end, batch, start=start, points=5).train
    measure = mean_loss([batch], F.cross_entropy)
    assert float(found.losses[found.shares == 0]) == measure(start)
    assert float(found.losses[found.shares == 1]) == measure(end)


def test_a_fall_is_ok_a_hill_is_a_warning_and_no_drop_cannot_tell():
    start, end, batch = problem()
    trained = copy.deepcopy(start)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(trained(batch[0]), batch[1]).backward()
        optimizer.step()
    assert straight_path(trained, batch, start=start).verdict == "ok"
    assert straight_path(start, batch, start=trained).verdict == "cannot tell"
    hill = copy.deepcopy(trained)
    with torch.no_grad():
        for layer in (hill[0].weight, hill[0].bias, hill[2].weight):
            layer.neg_()  # tanh is odd: the same function at the far side
        worse = copy.deepcopy(trained)
        worse[2].bias.add_(torch.tensor([0.5, 0.0, 0.0]))
    found = straight_path(hill, batch, start=worse)
    assert found.verdict == "warn"
    inside = (found.train.shares >= 0) & (found.train.shares <= 1)
    losses = found.train.losses[inside].tolist()
    rises = sum(max(0.0, after - before) for before, after in itertools.pairwise(losses))
    assert found.train.bumpiness == pytest.approx(rises / (losses[0] - losses[-1]))
    broken = copy.deepcopy(end)
    with torch.no_grad():
        broken[0].weight.fill_(math.nan)
    assert straight_path(broken, batch, start=start).verdict == "cannot tell"


def test_validation_is_measured_with_the_statistics_of_training():
    torch.manual_seed(0)
    start, end = (nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval() for _ in range(2))
    x, y = torch.randn(50, 4) + 3, torch.randint(3, (50,))
    other = (torch.randn(20, 4), torch.randint(3, (20,)))
    found = straight_path(end, (x, y), start=start, validation=other, points=3, beyond=0)
    middle = copy.deepcopy(start)
    with torch.no_grad():
        for value, away in zip(middle.parameters(), end.parameters(), strict=True):
            value.lerp_(away, 0.5)
    middle[1].running_mean = middle[0](x).mean(0).detach()
    middle[1].running_var = middle[0](x).var(0).detach()
    with torch.no_grad():
        expected = float(F.cross_entropy(middle(other[0]), other[1]))
    assert found.validation.losses[1].item() == pytest.approx(expected, rel=1e-5)
    assert found.train.losses[1] != found.validation.losses[1]
    assert isinstance(found, StraightPath)


def test_one_layer_moves_alone():
    start, end, batch = problem()
    found = straight_path(end, batch, start=start, points=3, beyond=0, parameters=["2"]).train
    mixed = copy.deepcopy(start)
    mixed[2].load_state_dict(end[2].state_dict())
    assert float(found.losses[-1]) == pytest.approx(mean_loss([batch], F.cross_entropy)(mixed))
