"""Stable ResNet against the closed form of the forward power, and against branches whose last layer is scaled."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nervure import zoo
from nervure._kit import NoEffect, Unsupported
from nervure.compress import SbpSr, stable_residual
from nervure.core import forward, residual
from nervure.spec import Budget
from nervure.testing import ToyTask
from nervure.testing.checks import untouched


class Deep(nn.Module):
    """x + W relu(x), L times, at He's initialisation: each branch keeps the mean square of its input."""

    def __init__(self, depth, width=600):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=math.sqrt(2 / width))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(F.relu(x))
        return x


@pytest.mark.parametrize("depth", [4, 16, 48])
def test_forward_power_follows_the_closed_form(depth):
    torch.manual_seed(depth)
    net, x = Deep(depth), torch.randn(32, 600)
    start = x.square().mean()
    with torch.no_grad():
        plain, stable = (float((made(x).square().mean() / start).log()) for made in (net, stable_residual(net)))
    assert stable == pytest.approx(depth * math.log1p(1 / depth), abs=0.1)
    assert stable < 1.1
    # Each of the L factors of 2 scatters by a percent or two.
    assert plain == pytest.approx(depth * math.log(2), rel=0.05)


LAST = {
    "residual-conv": ["blocks.0.bn2", "blocks.1.bn2"],
    "pre-activation": ["convs.1", "convs.3"],
    "vit": ["blocks.0.attention.out", "blocks.0.fc2", "blocks.1.attention.out", "blocks.1.fc2"],
}


@pytest.mark.parametrize("name", LAST)
def test_equals_scaled_last_layers_on_the_zoo(name):
    entry = zoo.case(name)
    model, (x, y) = entry.model().double().eval(), entry.batch(5)
    x = x.double()
    with torch.no_grad():
        for value in model.parameters():  # away from ones and zeros, where a lost bias would not show
            value.add_(0.1 * torch.randn_like(value))
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for last in LAST[name]:
            for value in by_hand.get_submodule(last).parameters():
                value.div_(math.sqrt(len(LAST[name])))
    with untouched(model):
        made = stable_residual(model)
    torch.testing.assert_close(made(x), by_hand(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stable_residual(model, factor=1.0)(x), model(x), rtol=0, atol=0)
    assert (made(x) - model(x)).abs().max() > 1e-3
    assert made.state_dict().keys() == model.state_dict().keys()
    assert not any(module.training for module in made.modules())
    assert "len" not in type(model).forward.__globals__
    assert made(forward.take(x, slice(0, 2))).shape == (2, 10)  # no batch size was burnt in
    entry.loss(made.train(), (x, y)).backward()
    assert all(value.grad is not None for value in made.parameters())
    assert all(value.grad is None for value in model.parameters())


def test_modes_are_kept_module_by_module():
    model = zoo.case("residual-conv").model()
    model.blocks[0].bn1.eval()
    made = stable_residual(model)
    assert {n: m.training for n, m in made.named_modules()} == {
        n: m.training for n, m in model.named_modules() if n in dict(made.named_modules())
    }


def test_it_can_be_pruned():
    inputs, targets = zoo.case("residual-conv").batch(16)
    made = stable_residual(zoo.case("residual-conv").model())
    small = SbpSr().fit(made, ToyTask(inputs, targets), Budget(target=0.3, steps=3), seed=0)
    assert small.report()["density"] == pytest.approx(0.3, abs=0.01)
    assert torch.isfinite(small.model(inputs)).all()


class Written(nn.Module):
    """One residual block, written in one of many ways, applied twice."""

    def __init__(self, way):
        super().__init__()
        self.stem, self.inner, self.outer = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.drop, self.position, self.way = nn.Dropout(0.0), nn.Parameter(torch.randn(4)), way

    def forward(self, x):
        x = self.stem(x) + self.position  # no residual add
        for _ in range(2):
            branch = self.drop(self.outer(F.relu(self.inner(x))))
            x = self.way(x, branch)
        return x


def _in_place(x, branch):
    branch += x
    return branch


WAYS = {
    "skip first": lambda x, branch: x + branch,
    "branch first": lambda x, branch: branch + x,
    "in place": _in_place,
    "by keyword": lambda x, branch: torch.add(x, other=branch),
    "method": lambda x, branch: x.add(branch),
    "activated": lambda x, branch: F.relu(branch + x),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_it(way):
    model, x = Written(WAYS[way]).double(), torch.randn(3, 6).double()
    made = stable_residual(model)
    inner = model.stem(x) + model.position
    for _ in range(2):
        branch = model.outer(F.relu(model.inner(inner))) / math.sqrt(2)
        inner = F.relu(inner + branch) if way == "activated" else inner + branch
    torch.testing.assert_close(made(x), inner)


PLAIN = (
    "mlp", "deep-conv", "depthwise", "u-net", "cat-chunk", "lstm", "raw-parameter", "twice-used", "dict-tuple", "graph",
)  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_network_is_refused(name):
    model = zoo.case(name).model()
    with untouched(model), pytest.raises(NoEffect, match="no residual add"):
        stable_residual(model)


def test_what_cannot_be_traced_is_refused():
    for name, reason in (("encoder", "cannot be reached"), ("tied-lm", "cannot be traced")):
        model = zoo.case(name).model()
        with untouched(model), pytest.raises(Unsupported, match=reason):
            stable_residual(model)
    assert "len" not in zoo.sequence.TiedLM.forward.__globals__

    class Functional(Deep):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.1, training=self.training)

    with pytest.raises(Unsupported, match="train and eval"):
        stable_residual(Functional(1, width=4))


def test_towers_and_deep_graphs():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.left(x) + self.right(x)

    with pytest.raises(NoEffect):
        stable_residual(Towers())
    net = Deep(60, width=2)  # paths through 60 adds: 2^60, so none may be walked one by one
    assert len(residual.residual_adds(net, residual.trace(net, method="test"))) == 60
