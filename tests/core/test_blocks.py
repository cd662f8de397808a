"""Cutting: the blocks in order are the network, share its parameters, and meet in one tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nervure import zoo
from nervure._kit import BadModel, Unsupported, UsageError
from nervure.core import blocks, forward

COUNTS = {
    "mlp": 3, "lenet-300-100": 3, "lenet": 5, "deep-conv": 7, "residual-conv": 4, "pre-activation": 4, "depthwise": 5,
    "u-net": 4, "cat-chunk": 4, "encoder": 3, "lstm": 2, "gru": 2, "tied-lm": 3, "raw-parameter": 2, "twice-used": 4,
    "dict-tuple": 2, "graph": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", zoo.names())
def test_blocks_in_order_are_the_network(name):
    case = zoo.case(name)
    model = case.model()
    if name not in COUNTS:
        with pytest.raises(Unsupported, match="traced"):
            blocks.cut(model)
        return
    parts = blocks.cut(model)
    assert len(parts) == COUNTS[name]
    inputs, _ = case.batch(4)
    model.eval()
    value = forward.call(parts[0], inputs)
    for part in parts[1:]:
        value = part(value)
    assert torch.equal(forward.logits(value), forward.outputs(model, inputs))
    held = {id(parameter) for part in parts for parameter in part.parameters()}
    assert held == {id(parameter) for parameter in model.parameters()}


def test_modes_and_dropout_follow_the_model():
    model = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Dropout(0.5), nn.Linear(50, 2))
    first = blocks.cut(model)[0]
    x = torch.rand(3, 4)
    assert not torch.equal(first(x), first(x))
    model.eval()
    assert torch.equal(first(x), first(x))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else -self.fc(x)


def test_stages_that_cannot_be_traced_are_held_for_opaque():
    model = nn.Sequential(nn.Linear(4, 4), Untraceable(), Untraceable(), nn.Linear(4, 2))
    parts = blocks.cut(model)
    assert len(parts) == 4
    for x in (torch.ones(2, 4), -torch.ones(2, 4)):
        blocks.check(parts, model, x)


class Held(nn.Module):
    """The input is needed until the end, so no single tensor carries everything."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) + x


class Functional(Held):
    def forward(self, x):
        return self.b(F.dropout(torch.relu(self.a(x)), training=self.training))


@pytest.mark.parametrize(
    ("model", "why"), [(Held(), "one tensor"), (Functional(), "dropout"), (Untraceable(), "traced|one tensor")]
)
def test_what_cannot_be_cut_is_refused(model, why):
    with pytest.raises(Unsupported, match=why):
        blocks.cut(model)


def vit_parts(model):
    def embed(x):
        x = model.patch(x).flatten(2).transpose(1, 2)
        return torch.cat([model.token.expand(len(x), -1, -1), x], 1) + model.position

    return [embed, "blocks.0", ("blocks.1", "norm", lambda x: x[:, 0], "head")]


def test_given_parts():
    case = zoo.case("vit")
    model = case.model()
    inputs, _ = case.batch(3)
    parts = blocks.cut(model, parts=vit_parts(model))
    assert [tuple(out.shape) for out in blocks.check(parts, model, inputs)] == [(3, 5, 16), (3, 5, 16), (3, 10)]
    with pytest.raises(BadModel, match="do not compute"):
        blocks.check(blocks.cut(model, parts=[*vit_parts(model)[:2], (lambda x: x[:, 0], "head")]), model, inputs)
    with pytest.raises(UsageError, match="no module"):
        blocks.cut(model, parts=["nope", "head"])


def test_the_model_is_left_alone():
    model = zoo.case("residual-conv").model()
    before = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    parts = blocks.cut(model)
    blocks.check(parts, model, zoo.case("residual-conv").batch(4)[0])
    assert names == [name for name, _ in model.named_modules()]
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
