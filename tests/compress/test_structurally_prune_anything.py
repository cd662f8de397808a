"""OBSPA against least squares, convolutions unfolded by hand, and SPA's choices."""

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn
from torch.nn import functional as F

from nervure._kit import UsageError
from nervure.compress import Obspa, Spa
from nervure.compress.structurally_prune_anything import input_hessians, removal_errors, surgeon
from nervure.spec import Budget
from nervure.testing import toy_task

TINY = 1e-12


def layer(kind):
    torch.manual_seed(0)
    x = torch.randn(40, 6, 9, 9, dtype=torch.float64)
    made = {
        "linear": lambda: nn.Linear(6, 5),
        "conv": lambda: nn.Conv2d(6, 5, 3, padding=1, stride=2),
        "dilated": lambda: nn.Conv2d(6, 5, (3, 2), dilation=(2, 1), padding=(2, 0)),
        "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2),
        "line": lambda: nn.Conv1d(6, 5, 3, padding=2),
    }[kind]().double()
    return made, {"linear": x[:, :, 0, 0], "line": x[:, :, 0]}.get(kind, x)


@pytest.mark.parametrize("kind", ["linear", "conv", "dilated", "grouped", "line"])
def test_moments_give_the_layers_own_outputs(kind):
    """W H W' is the second moment of the layer's outputs."""
    module, x = layer(kind)
    module.bias.data.zero_()
    hessian = input_hessians(module, [(x, None)])["weight"]
    rows = module.weight.detach().flatten(1).reshape(len(hessian), -1, hessian.shape[-1])
    y = module(x).detach()
    y = y.movedim(1, -1).reshape(-1, y.shape[1]) if kind != "linear" else y
    groups = y.T.reshape(len(hessian), -1, len(y))
    torch.testing.assert_close(rows @ hessian @ rows.mT, groups @ groups.mT, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "conv", "line"])
def test_the_update_is_the_restricted_least_squares_fit(kind):
    module, x = layer(kind)
    module.bias.data.zero_()
    hessian = input_hessians(module, [(x, None)])["weight"]
    keep = torch.tensor([0, 2, 3, 5])
    new = surgeon(module.weight.detach(), hessian, keep, damping=TINY)
    twin, _ = layer(kind)
    twin.bias.data.zero_()
    basis = []  # outputs of each single kept weight entry, for one output channel
    shape = (1, len(keep), *module.weight.shape[2:])
    for place in range(int(np.prod(shape))):
        unit = torch.zeros(int(np.prod(shape)), dtype=torch.float64)
        unit[place] = 1
        full = torch.zeros_like(module.weight)
        full[:1, keep] = unit.view(shape)
        twin.weight.data.copy_(full)
        out = twin(x).detach()
        basis.append((out if kind == "linear" else out.movedim(1, -1).reshape(-1, 5))[:, 0].numpy())
    y = module(x).detach()
    y = (y if kind == "linear" else y.movedim(1, -1).reshape(-1, 5)).numpy()
    fit = np.stack([linalg.lstsq(np.stack(basis, 1), y[:, row])[0] for row in range(5)])
    np.testing.assert_allclose(new.flatten(1).numpy(), fit, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_the_error_of_a_channel_is_what_the_best_update_leaves(kind):
    module, x = layer(kind)
    module.bias.data.zero_()
    hessian = input_hessians(module, [(x, None)])["weight"]
    errors = removal_errors(nn.Sequential(module), [(x, None)], damping=TINY)["0.weight"]
    y = module(x).detach()
    for channel in range(module.weight.shape[1]):
        keep = torch.tensor([place for place in range(module.weight.shape[1]) if place != channel])
        new = torch.zeros_like(module.weight)
        new[:, keep] = surgeon(module.weight.detach(), hessian, keep, damping=TINY)
        twin, _ = layer(kind)
        twin.bias.data.zero_()
        twin.weight.data.copy_(new)
        assert float((twin(x).detach() - y).square().sum()) == pytest.approx(float(errors[channel]), rel=1e-5)


def test_a_redundant_channel_costs_nothing_and_is_cut_first():
    """Two hidden units are copies: either goes, and the outputs stay."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = net[0].weight[0], net[0].bias[0]
    task = toy_task()
    small = Obspa(damping=1e-9).fit(net, task, Budget(target=0.8, metric="macs"), seed=0)
    gone = (~small.keep[0]).nonzero().flatten().tolist()
    assert gone in ([0], [2])
    torch.testing.assert_close(small.model(task.inputs), net(task.inputs), rtol=1e-3, atol=1e-3)


def test_the_update_keeps_more_than_cutting_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    task = toy_task(count=256)
    budget, errors = Budget(target=0.5, metric="macs"), []
    for update in (True, False):
        small = Obspa(update=update).fit(net, task, budget, seed=0).model
        errors.append(float(F.mse_loss(small(task.inputs), net(task.inputs)).detach()))
    assert errors[0] < 0.2 * errors[1]


def test_spa_before_training_looks_at_the_loss():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))
    with torch.no_grad():
        net[0].bias[:5] = -100.0  # these never fire, so the loss does not feel them
        net[0].weight[:5] *= 10
    budget = Budget(target=0.5, metric="macs")
    informed = Spa(score="sensitivity", when="init").fit(net, toy_task(), budget, seed=0)
    assert informed.keep[0].tolist() == [False] * 5 + [True] * 5
    by_size = Spa(when="init").fit(net, toy_task(), budget, seed=0)
    assert by_size.keep[0].tolist() == [True] * 5 + [False] * 5


def test_bad_arguments():
    with pytest.raises(UsageError, match="no such score"):
        Spa(score="beauty")
    with pytest.raises(UsageError, match="damping"):
        Obspa(damping=0)
