"""Concatenated features against the inputs of last layers, kernels of copies, and a case in closed form."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nervure import zoo
from nervure._kit import Unsupported, UsageError
from nervure.core import forward, heads
from nervure.core.readout import Readout
from nervure.learn._cat_trial import of_classes
from nervure.learn._many_heads import ManyHeads, distil_heads, head_targets, width_of
from nervure.learn.cat_representations import Concat, head_layer

REFUSED = {"u-net", "raw-parameter"}  # scores made by a convolution, and by a function that no module calls


@pytest.mark.parametrize("name", zoo.names())
def test_features_are_the_inputs_of_the_last_layer(name):
    case = zoo.case(name)
    inputs, _ = case.batch(6, seed=0)
    models = [case.model(seed=seed).eval() for seed in (0, 1)]
    try:
        truth = [heads.head(model, inputs, method="test").features for model in models]
        features = Concat(models, inputs)
    except Unsupported:
        assert name in REFUSED
        return
    assert name not in REFUSED
    before = copy.deepcopy(features.state_dict())
    found = forward.call(features, inputs)
    torch.testing.assert_close(found.flatten(0, -2), torch.cat(truth, 1), rtol=1e-5, atol=1e-6)
    found.sum().backward()
    assert all(torch.equal(before[key], value) for key, value in features.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in features.modules())


def test_copies_of_one_network_give_its_kernel_times_their_number():
    case = zoo.case("mlp")
    model, (x, y) = case.model(seed=0), case.batch(60, seed=0)
    one, four = Concat([model], x), Concat([model] * 4, x)
    a, b = forward.predict(one, x).double(), forward.predict(four, x).double()
    torch.testing.assert_close(b @ b.T, 4 * a @ a.T)
    assert Readout(b[:40], y[:40]).predict(b).shape == (60,)
    probe = [Readout(f[:40], y[:40], kind="nearest-neighbours").predict(f) for f in (a, b)]
    assert torch.equal(*probe)


def test_seeds_pick_one_of_two_redundant_features_and_together_span_both():
    # Two orthogonal features, each enough: a unit that starts on one of them is fitted by it alone.
    draw = torch.Generator().manual_seed(0)
    y = 2.0 * torch.randint(2, (200,), generator=draw) - 1
    x = torch.stack([y, y * (1 + torch.rand(200, generator=draw))], 1)

    def net(seed):
        model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(2)[seed].view(1, 2))
        return model

    nets = [net(0), net(1)]
    ranks = [int(torch.linalg.matrix_rank(forward.predict(Concat(some, x), x))) for some in ([nets[0]], nets)]
    assert ranks == [1, 2]
    # A new task that needs the second feature's size is solved by both features, and by the first not at all.
    new = (x[:, 1].abs() > 1.5).long()
    size = [forward.predict(Concat(some, x), x) * y.view(-1, 1) for some in ([nets[0]], nets)]
    assert Readout(size[1], new).accuracy(size[1], new) > 0.95
    assert (
        Readout(torch.cat([size[0], size[0] * y.view(-1, 1)], 1), new).accuracy(
            torch.cat([size[0], size[0] * y.view(-1, 1)], 1), new
        )
        < 0.65
    )


def test_layers_by_name_and_errors():
    nets = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(2)]
    x = torch.randn(5, 3)
    assert torch.equal(Concat(nets, layers=["0", "2"])(x), torch.cat([x, nets[1][:2](x)], 1))
    assert head_layer(nets[0], x) == "2"
    with pytest.raises(UsageError, match="nothing to concatenate"):
        Concat([], x)
    with pytest.raises(UsageError, match="nothing to concatenate"):
        Concat(nets, layers=["0"])
    with pytest.raises(UsageError, match="no layer"):
        Concat(nets, layers=["0", "9"])
    with pytest.raises(Unsupported, match=r"nn\.Linear"):
        head_layer(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), x)

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(Unsupported, match="does not call"):
        Concat([Idle()], layers=["idle"])(x)


def test_heads_regress_the_networks():
    nets = [nn.Linear(6, 3) for _ in range(3)]
    x = torch.randn(64, 6)
    targets = head_targets(nets, x)
    assert targets.shape == (64, 3, 3)
    student = ManyHeads(nn.Sequential(nn.Linear(6, 20)), width=20, heads=3, classes=3)
    assert width_of(student.extractor, x) == 20
    loop = sum(
        4 * F.kl_div((student(x)[:, h] / 2).log_softmax(1), (targets[:, h] / 2).softmax(1), reduction="batchmean")
        for h in range(3)
    )
    torch.testing.assert_close(distil_heads(student(x), targets), loop / 3)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        distil_heads(student(x), targets).backward()
        optimizer.step()
    assert float((student(x).argmax(2) == targets.argmax(2)).double().mean()) > 0.95
    one = ManyHeads(nn.Linear(6, 4), width=4, heads=1, classes=2)
    assert one(x).shape == (64, 2)


def test_classes_are_numbered_anew():
    from nervure.data import load

    data = load("digits", test=300)
    some = of_classes(data, [3, 7])
    assert some.classes == 2
    assert torch.equal(some.train_x, data.train_x[(data.train_y == 3) | (data.train_y == 7)])
    assert some.train_y.unique().tolist() == [0, 1]
