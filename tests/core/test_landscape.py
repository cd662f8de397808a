import copy

import pytest
import torch
from torch import nn

from nervure._kit import BadModel, UsageError
from nervure.core import landscape
from nervure.core.vectors import flatten


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).double()


def vector(model):
    return flatten([value.detach() for value in model.parameters()])


def quadratic(model):
    return 0.5 * vector(model).square().sum()


def test_losses_of_a_quadratic_are_the_exact_paraboloid():
    model = net()
    frame = landscape.random_plane(model, seed=3)
    found = landscape.plane(frame, quadratic, extent=1.5, points=7)
    start = vector(model)
    for row, y in enumerate(found.ys):
        for column, x in enumerate(found.xs):
            expected = 0.5 * (start + x * frame.u + y * frame.v).square().sum()
            assert found.losses[row, column].item() == pytest.approx(expected.item(), rel=1e-10)
    assert found.losses[3, 3] == quadratic(model)


def test_filters_of_a_random_direction_are_as_long_as_the_networks_and_vectors_do_not_move():
    model = net()
    frame = landscape.random_plane(model)
    place = 0
    for value in model.parameters():
        part = frame.u[place : place + value.numel()].view(value.shape)
        place += value.numel()
        if value.ndim < 2:
            assert not part.any()
        else:
            torch.testing.assert_close(part.flatten(1).norm(dim=1), value.detach().flatten(1).norm(dim=1))
    # The direction grows with the weights: a coordinate of 1 means the same for a network ten times as large.
    larger = copy.deepcopy(model)
    with torch.no_grad():
        larger[0].weight.mul_(10)
    torch.testing.assert_close(landscape.random_plane(larger).u[:12], 10 * frame.u[:12])


def test_a_larger_extent_reaches_further():
    """The trap of a peer: steps divided by the distance asked for, so that a larger distance shrinks the plane."""
    model, reach = net(), []
    frame = landscape.random_plane(model)
    start = vector(model)
    for extent in (0.5, 1.0, 2.0):
        far = []
        landscape.plane(frame, lambda one, far=far: far.append((vector(one) - start).norm()) or 0.0, extent=extent)
        reach.append(float(max(far)))
    assert reach[1] == pytest.approx(2 * reach[0])
    assert reach[2] == pytest.approx(4 * reach[0])


def test_the_plane_through_three_networks_holds_them():
    first, second, third = net(0), net(1), net(2)
    frame = landscape.plane_through(first, second, third)
    found = landscape.plane(frame, quadratic, networks=[first, second, third, net(3)], points=3, extent=0.1)
    apart = float((vector(second) - vector(first)).norm())
    assert found.networks[0] == pytest.approx((0, 0, 0), abs=1e-12)
    assert found.networks[1] == pytest.approx((apart, 0, 0), abs=1e-9)
    x, y, off = found.networks[2]
    assert x**2 + y**2 == pytest.approx(float((vector(third) - vector(first)).square().sum()))
    assert off == pytest.approx(0, abs=1e-9)
    assert found.networks[3][2] > 1
    assert found.xs[0] <= min(one[0] for one in found.networks)
    assert found.xs[-1] >= max(one[0] for one in found.networks)
    assert found.units == pytest.approx((1, 1))


def test_the_principal_plane_is_that_of_the_singular_vectors():
    run = [net(seed) for seed in range(5)]
    frame = landscape.principal_plane(run)
    matrix = torch.stack([vector(one) - vector(run[-1]) for one in run[:-1]]).numpy()
    import numpy as np

    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    assert abs(float(torch.from_numpy(vectors[:, -1]) @ frame.u)) == pytest.approx(1)
    assert abs(float(torch.from_numpy(vectors[:, -2]) @ frame.v)) == pytest.approx(1)
    assert frame.explained == pytest.approx(values[-2:].sum() / values.sum())


def test_statistics_are_kept_or_those_of_the_batches_and_the_network_is_left_alone():
    model, x = net(), torch.randn(50, 1, 3, 3, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    frame = landscape.random_plane(model)
    for statistics in ("kept", "recomputed"):
        seen = []

        def loss(one, seen=seen):
            seen.append((one[1].running_mean.clone(), one[0](x).mean((0, 2, 3)).detach()))
            return 0.0

        found = landscape.plane(frame, loss, points=3, statistics=statistics, batches=[x])
        mean, expected = seen[0]
        torch.testing.assert_close(mean, expected if statistics == "recomputed" else before["1.running_mean"])
        assert torch.equal(seen[4][0], before["1.running_mean"])
        assert found.statistics == statistics
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_progress_is_told():
    seen = []
    landscape.plane(
        landscape.random_plane(net()), quadratic, points=3, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, 9) for done in range(1, 10)]


def test_what_spans_no_plane_is_told():
    first, second = net(0), net(1)
    with pytest.raises(UsageError, match="span no plane"):
        landscape.plane_through(first, second, second)
    with pytest.raises(UsageError, match="at least three"):
        landscape.principal_plane([first, second])
    with pytest.raises(BadModel, match="two shapes"):
        landscape.plane_through(first, second, nn.Linear(2, 2).double())
    with pytest.raises(UsageError, match="cannot be measured"):
        landscape.plane(landscape.random_plane(first), quadratic, points=1)
    with pytest.raises(UsageError, match="cannot be measured"):
        landscape.plane(landscape.random_plane(first), quadratic, statistics="recomputed")
