"""Universal tickets against their basis in closed form and against polynomials they have never seen."""

import pytest
import torch

from nervure._kit import BadData, UsageError
from nervure.compress import universal_lottery_tickets as module
from nervure.compress import universal_ticket
from nervure.core import masks


@pytest.mark.parametrize(("basis", "eps", "count"), [("monomials", 0.03, 6), ("sines", 0.2, 3)])
def test_the_basis_is_within_eps_of_its_closed_form(basis, eps, count):
    ticket = universal_ticket(basis, eps, count=count)
    x = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    k = torch.arange(1, count + 1)
    expected = x[:, None].pow(k) if basis == "monomials" else (torch.pi * x[:, None] * k).sin()
    with torch.no_grad():
        found = ticket.model(x[:, None])
    assert 0 < float((found - expected).abs().max()) <= eps


@pytest.mark.parametrize("basis", ["monomials", "sines"])
def test_interpolation_is_exact_at_the_knots_and_close_between_them(basis):
    net = module._interpolant(basis, 0.01, 5)
    knots = torch.linspace(0, 1, net[0].out_features + 1, dtype=torch.float64)
    between = torch.linspace(0, 1, 5001, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(2 * knots[:, None] - 1), module.values(basis, knots, 5))
        worst = float((net(2 * between[:, None] - 1) - module.values(basis, between, 5)).abs().max())
    assert 0.002 < worst <= 0.01


def test_new_tasks_of_several_coordinates_are_read_out_of_one_mask():
    ticket = universal_ticket("monomials", 0.01, count=4)
    kept = masks.read(ticket.model)
    draw = torch.Generator().manual_seed(0)
    x, new = (torch.rand(400, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    for task in (lambda z: z[:, 0] ** 3 - z[:, 1] + 2, lambda z: (1 - z[:, 2]) ** 4, lambda z: z.pow(2)):
        assert float((ticket.fit(x, task(x))(new) - task(new)).abs().max()) < 0.03
    assert all(torch.equal(mask, kept[name]) for name, mask in masks.read(ticket.model).items())


def test_one_network_serves_every_coordinate():
    ticket = universal_ticket("monomials", 0.1, count=3)
    x = torch.rand(20, 2, dtype=torch.float64)
    features = ticket.features(x)
    assert torch.equal(features[:, 1:4], ticket.features(x[:, :1])[:, 1:])
    assert torch.equal(features[:, 4:], ticket.features(x[:, 1:])[:, 1:])
    assert bool((features[:, 0] == 1).all())


def test_masks_hold_and_the_seed_decides():
    one, again, other = (universal_ticket("monomials", 0.1, count=2, seed=seed) for seed in (1, 1, 2))
    x = torch.rand(5, 1, dtype=torch.float64)
    assert torch.equal(one.features(x), again.features(x))
    assert not torch.equal(one.features(x), other.features(x))
    assert masks.density(masks.read(one.model)) == one.density < 0.5


def test_bad_arguments():
    with pytest.raises(UsageError, match="no such basis"):
        universal_ticket("sines", 0)
    with pytest.raises(BadData, match="lives on"):
        universal_ticket("monomials", 0.1, count=1).features(torch.tensor([[2.0]]))
