"""Mono-Forward: gradients against autograd of the local losses, bytes against a count by hand."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nervure import zoo
from nervure._kit import BadData, Diverged, Unsupported, UsageError
from nervure.core import forward
from nervure.core.budget import Meter
from nervure.learn.mono_forward import MonoForward


class Recorder(torch.optim.Optimizer):
    """Keep the gradients it is handed and change nothing."""

    def __init__(self, parameters):
        super().__init__(list(parameters), {})
        self.seen = []

    def step(self, closure=None):
        self.seen = [(p, None if p.grad is None else p.grad.clone()) for g in self.param_groups for p in g["params"]]


WORKS = [
    "mlp", "lenet-300-100", "lenet", "deep-conv", "residual-conv", "pre-activation", "depthwise", "u-net", "cat-chunk",
    "encoder", "graph",
]  # fmt: skip
REFUSED = {
    "vit": "traced",
    "lstm": "one hidden block",
    "gru": "one hidden block",
    "dict-tuple": "one hidden block",
    "raw-parameter": "one hidden block",
    "twice-used": "share",
    "tied-lm": "share",
}


def local_reference(rule, inputs, targets):
    """Autograd of each block's own loss, from a detached input, written out."""
    value, found = inputs, {}
    for index, block in enumerate(rule.blocks):
        output = forward.call(block, value) if index == 0 else block(value)
        main = forward.logits(output)
        if index < len(rule.projections):
            scores = main.flatten(1) @ rule.projections[index].weight.T
            own = [*block.parameters(), rule.projections[index].weight]
        else:
            scores, own = main, [*block.parameters()]
        loss = F.cross_entropy(scores, targets)
        for parameter, grad in zip(own, torch.autograd.grad(loss, own), strict=True):
            found[parameter] = grad
        others = [p for other, b in enumerate(rule.blocks) if other != index for p in b.parameters()]
        again = forward.logits(forward.call(block, value) if index == 0 else block(value))
        cross = torch.autograd.grad(again.sum(), others, allow_unused=True)
        assert all(grad is None for grad in cross)
        value = main.detach()
    return found


@pytest.mark.parametrize("name", WORKS)
def test_gradients_are_those_of_the_local_losses(name):
    case = zoo.case(name)
    model = case.model().double()
    inputs, targets = case.batch(6)
    inputs = forward.tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)
    rule = MonoForward(model, inputs, optimizer=Recorder)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))  # left behind by the user
    rule.step((inputs, targets))
    wanted = local_reference(rule, inputs, targets)
    seen = [pair for optimizer in rule.optimizers for pair in optimizer.seen]
    assert {p for p, _ in seen} == set(model.parameters()) | set(rule.projections.parameters())
    for parameter, grad in seen:
        torch.testing.assert_close(grad, wanted[parameter], rtol=1e-9, atol=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("name", "why"), REFUSED.items())
def test_what_it_cannot_train_is_refused(name, why):
    case = zoo.case(name)
    with pytest.raises(Unsupported, match=why):
        MonoForward(case.model(), case.batch(4)[0])


def test_a_vit_by_given_parts_and_a_language_model():
    case = zoo.case("vit")
    model = case.model()
    inputs, targets = case.batch(16)

    def embed(x):
        x = model.patch(x).flatten(2).transpose(1, 2)
        return torch.cat([model.token.expand(len(x), -1, -1), x], 1) + model.position

    with pytest.raises(Unsupported, match="no block holds"):
        MonoForward(model, inputs, parts=[embed, "blocks.0", ("blocks.1", "norm", lambda x: x[:, 0], "head")])

    class Embed(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.token, self.position = model.patch, model.token, model.position

        def forward(self, x):
            return embed(x)

    parts = [Embed(), "blocks.0", ("blocks.1", "norm", lambda x: x[:, 0], "head")]
    rule = MonoForward(model, inputs, parts=parts, features="pool")
    losses = [rule.step((inputs, targets))["loss"] for _ in range(40)]
    assert losses[-1] < losses[0]

    class LM(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.fc = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 9)

        def forward(self, x):
            return self.head(torch.relu(self.fc(torch.relu(self.mix(self.embed(x))))))

    tokens = torch.randint(9, (32, 5))
    rule = MonoForward(LM(), tokens, optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
    losses = [rule.step((tokens, tokens))["loss"] for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]
    assert rule.predict(tokens).shape == (32, 5, 9)


def mlp(depth, width=32):
    layers = [nn.Linear(8, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 5))


def test_saved_bytes_are_those_of_the_widest_block_alone():
    x, y = torch.randn(16, 8), torch.randint(5, (16,))
    peaks = {}
    for depth in (3, 6, 12):
        model = mlp(depth)
        rule = MonoForward(model, x, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        with Meter(model, rule.projections) as meter:
            rule.step((x, y))
        peaks[depth] = meter.peak_saved_bytes
        assert meter.saved_bytes == 0
    # The widest is a hidden block: its input and, saved twice (by ReLU and by the projection), its output; the
    # log-probabilities (twice: by log-softmax and by the loss), the targets and the loss's total weight.
    hidden = 4 * (16 * 32 + 2 * 16 * 32 + 2 * 16 * 5) + 8 * 16 + 4
    assert peaks == dict.fromkeys((3, 6, 12), hidden)


def test_readings():
    case = zoo.case("lenet")
    model = case.model()
    inputs, targets = case.batch(8)
    rule = MonoForward(model, inputs, reading="ff")
    rule.step((inputs, targets))
    model.eval()
    value, total = inputs, 0
    for index, block in enumerate(rule.blocks):
        value = block(value)
        total = total + (value if index == 3 else value.flatten(1) @ rule.projections[index].weight.T)
    torch.testing.assert_close(rule.predict(inputs), total.detach())
    rule.reading = "bp"
    torch.testing.assert_close(rule.predict(inputs), model(inputs).detach())
    assert not model.training


@pytest.mark.parametrize("make", [torch.optim.Adam, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)])
def test_resume_is_exact_through_a_file(make):
    def fresh():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 16), nn.ReLU(),
            nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3),
        )  # fmt: skip

    x, y = torch.randn(20, 8), torch.randint(3, (20,))
    one, half = fresh(), fresh()
    whole, begun = MonoForward(one, x, optimizer=make, seed=3), MonoForward(half, x, optimizer=make, seed=3)
    for _ in range(6):
        whole.step((x, y))
    for _ in range(3):
        begun.step((x, y))
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    other = fresh()
    resumed = MonoForward(other, x, optimizer=make, seed=99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        resumed.step((x, y))
    assert resumed.steps == whole.steps
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_rng_modes_and_frozen_parts_are_left_alone():
    model = zoo.case("residual-conv").model()
    model.bn.eval()
    model.stem.weight.requires_grad_(False)
    inputs, targets = zoo.case("residual-conv").batch(8)
    frozen = model.stem.weight.clone()
    state = torch.get_rng_state()
    rule = MonoForward(model, inputs)
    rule.step((inputs, targets))
    rule.predict(inputs)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not model.bn.training
    assert torch.equal(frozen, model.stem.weight)
    with pytest.raises(BadData):
        rule.step((inputs, targets[:3]))
    with pytest.raises(Diverged):
        rule.step((inputs * float("nan"), targets))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not model.bn.training


def test_it_learns_where_random_features_do_not():
    """Labels are the parity of three signs: a linear read-out of few random features cannot see it."""
    torch.manual_seed(1)
    x = torch.randn(512, 8)
    y = (x[:, :3] > 0).sum(1) % 2
    model = mlp(3)
    frozen = copy.deepcopy(model)
    rule = MonoForward(model, x, optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
    for _ in range(300):
        rule.step((x, y))
    for parameter in list(frozen.parameters())[:-2]:
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in frozen.parameters() if p.requires_grad], lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(frozen(x), y).backward()
        optimizer.step()
    right = [float((net(x).argmax(1) == y).double().mean()) for net in (model, frozen)]
    assert right[0] > 0.95
    assert right[1] < 0.8


def test_wrong_options():
    x = torch.randn(4, 8)
    with pytest.raises(UsageError):
        MonoForward(mlp(3), x, features="sum")
    with pytest.raises(UsageError):
        MonoForward(mlp(3), x, reading="loud")
