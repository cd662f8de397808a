"""Strong tickets: the bound against true errors, picks against enumeration, masks against the random network."""

import itertools

import pytest
import torch
from torch import nn

from nervure._kit import BadBudget, Unsupported, UsageError
from nervure.compress import construct
from nervure.compress import pruning_is_all_you_need as module
from nervure.core import masks


def net(*sizes, dtype=torch.float64):
    torch.manual_seed(0)
    parts = []
    for a, b in itertools.pairwise(sizes):
        parts += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*parts[:-1]).to(dtype)


@pytest.mark.parametrize("gadget", ["subset-sum", "pair"])
@pytest.mark.parametrize(("sizes", "eps"), [((2, 8, 1), 0.03), ((3, 6, 5, 2), 0.2)])
def test_the_error_is_within_the_bound_and_the_bound_within_eps(gadget, sizes, eps):
    target = net(*sizes)
    ticket = construct(target, eps, gadget=gadget, radius=2.0, seed=1)
    x = (torch.rand(2_000, sizes[0], dtype=torch.float64) * 2 - 1) * 2
    worst = float((ticket.model(x) - target(x)).abs().max().detach())
    assert 0 < worst <= ticket.bound <= eps


def test_the_bound_of_one_linear_layer_is_attained_in_a_corner():
    target = net(3, 1)
    ticket = construct(target, 0.05, gadget="pair", radius=1.5)
    corners = torch.tensor(list(itertools.product([-1.5, 1.5], repeat=3)), dtype=torch.float64)
    worst = float((ticket.model(corners) - target(corners)).abs().max().detach())
    # The bound takes the worse sign of every input and adds all up; no more than the signs' difference is lost.
    assert worst <= ticket.bound <= 0.05
    layer = module._drawn(target[0], 1 << 15, 0, 0)
    gap = layer.pick(ticket.candidates, "pair")[1]
    assert ticket.bound == pytest.approx(float(1.5 * gap[0, :3].sum() + gap[0, 3]))


def test_a_box_of_its_own_for_each_input():
    target, radius = net(2, 6, 1), torch.tensor([3.0, 0.5])
    ticket = construct(target, 0.1, radius=radius)
    x = (torch.rand(2_000, 2, dtype=torch.float64) * 2 - 1) * radius
    assert float((ticket.model(x) - target(x)).abs().max().detach()) <= ticket.bound <= 0.1
    assert ticket.candidates <= construct(target, 0.1, radius=3.0).candidates


@pytest.mark.parametrize("gadget", ["subset-sum", "pair"])
def test_picks_are_the_best_by_enumeration(gadget):
    layer = module._drawn(net(2, 3)[0], 11, 5, 0)
    kept, error = layer.pick(11, gadget)
    for i, j in itertools.product(range(3), range(3)):
        errors = []
        for sign in (1, -1):
            usable = [m for m in range(11) if layer.b[m, j] * sign > 0]
            products = [float(layer.a[m, j, i] * layer.b[m, j]) for m in usable]
            most = len(usable) if gadget == "subset-sum" else 1
            w = float(layer.weight[i, j])
            sums = [sum(some) for size in range(most + 1) for some in itertools.combinations(products, size)]
            best = min(abs(total - w) for total in sums)
            mine = sum(product for m, product in zip(usable, products, strict=True) if kept[m, j, i])
            assert abs(mine - w) == pytest.approx(best, abs=1e-12)
            errors.append(best)
        assert float(error[i, j]) == pytest.approx(max(errors), abs=1e-12)


def test_the_result_is_a_random_network_under_masks_and_nothing_else():
    ticket = construct(net(2, 4, 1), 0.1)
    found = masks.read(ticket.model)
    assert len(found) == 4  # twice as deep
    assert ticket.density == masks.density(found)
    linears = [part for part in ticket.model if isinstance(part, nn.Linear)]
    assert [linear.out_features for linear in linears[::2]] == list(ticket.widths)
    assert all(linear.bias is None for linear in linears)
    assert not any(parameter.requires_grad for parameter in ticket.model.parameters())


def test_one_candidate_less_does_not_do():
    target = net(2, 5, 1)
    for gadget in ("subset-sum", "pair"):
        ticket = construct(target, 0.1, gadget=gadget)
        layers = [module._drawn(linear, module._MOST[gadget], 0, i) for i, linear in enumerate(target[::2])]
        assert module._bound(layers, ticket.candidates - 1, gadget, torch.ones(2).double()) > 0.1 >= ticket.bound


def test_single_precision_state_and_seeds():
    target, x = net(2, 4, 1, dtype=torch.float32), torch.rand(100, 2) * 2 - 1
    state = torch.get_rng_state()
    one, again, other = (construct(target, 0.1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.model(x), again.model(x))
    assert not torch.equal(one.model(x), other.model(x))
    again.model.load_state_dict(one.model.state_dict())
    assert torch.equal(one.model(x), again.model(x))
    assert target[0].weight.requires_grad


def test_what_is_refused():
    for model in (
        nn.Sequential(nn.Conv2d(1, 1, 3)),
        nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)),
        nn.ReLU(),
    ):
        with pytest.raises(Unsupported, match="Linear and ReLU in turns"):
            construct(model, 0.1)
    for eps, radius in ((0, 1.0), (0.1, -1.0), (0.1, torch.ones(3))):
        with pytest.raises(UsageError, match="no such eps or box"):
            construct(net(2, 1), eps, radius=radius)
    with pytest.raises(BadBudget, match="no mask"):
        construct(net(2, 4, 1), 1e-13)
