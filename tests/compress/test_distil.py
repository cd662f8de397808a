"""Inner distillation against the loss written out with autograd."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nervure import zoo
from nervure._kit import BadModel, UsageError
from nervure.compress.distil import InnerDistillation
from nervure.core import forward, rng
from nervure.core.channels import ChannelGraph


def pair(name="residual-conv"):
    case = zoo.case(name)
    teacher, (x, y) = case.model(), case.batch(8)
    graph = ChannelGraph.of(teacher, x)
    keep = {g.id: torch.arange(g.size) < (g.size + 1) // 2 for g in graph.groups if g.exact}
    return graph.cut(teacher, keep), teacher, case, (x, y)


def test_the_added_gradient_is_that_of_the_loss_written_out():
    student, teacher, _, (x, y) = pair()
    twin = copy.deepcopy(student)
    with InnerDistillation(student, teacher, x, at=["blocks.0", "blocks.1"], weight=3.0) as inner:
        F.cross_entropy(student(x), y).backward()
    teacher.eval()
    features = []
    for net in (twin, teacher):
        h = F.relu(net.bn(net.stem(x)))
        for block in net.blocks:
            h = block(h)
            features.append(h)
    total = F.cross_entropy(twin.head(features[1].mean((2, 3))), y)
    for place, name in enumerate(("blocks.0", "blocks.1")):
        mapped = torch.einsum("oc,nchw->nohw", inner.maps[name].weight.detach(), features[place])
        total = total + 3.0 / 2 * F.mse_loss(mapped, features[2 + place].detach())
    total.backward()
    for one, two in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)
    assert all(map_.weight.grad is not None for map_ in inner.maps.values())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_maps_start_at_least_squares_and_equal_networks_feel_nothing():
    student, teacher, _, (x, _) = pair()
    inner = InnerDistillation(student, teacher, x, at=["blocks.0"])
    seen = []
    for net in (student, teacher):
        handle = net.blocks[0].register_forward_hook(lambda m, a, out: seen.append(out.movedim(1, -1).flatten(0, -2)))
        forward.predict(net, x)
        handle.remove()
    best = torch.linalg.lstsq(seen[0].double(), seen[1].double()).solution.T
    fitted = [float((seen[0].double() @ w.double().T - seen[1]).square().sum())
              for w in (best, inner.maps["blocks.0"].weight.detach())]  # fmt: skip
    assert fitted[1] == pytest.approx(fitted[0], rel=1e-3)
    twin = copy.deepcopy(teacher).eval()
    with InnerDistillation(twin, teacher, x) as same:
        assert same.parameters() == []
        for module in twin.modules():
            module.train(module is twin)
        (twin(x).sum() * 0).backward()
    assert all(float(p.grad.abs().max()) < 1e-6 for p in twin.parameters())


# The one model left out has a single layer for each input, and so no inner features to distil.
@pytest.mark.parametrize("name", [name for name in zoo.names() if name != "dict-tuple"])
def test_every_zoo_model_can_be_distilled_into_its_half(name):
    student, teacher, case, batch = pair(name)
    before = [p.detach().clone() for p in teacher.parameters()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in student.modules())
    with InnerDistillation(student, teacher, batch[0], weight=1.0) as inner:
        optimizer = torch.optim.Adam([*student.parameters(), *inner.parameters()], lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            case.loss(student, batch).backward()
            optimizer.step()
    assert inner.points
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in student.modules()) == hooks
    assert all(torch.equal(one, two) for one, two in zip(before, teacher.parameters(), strict=True))
    assert all(p.grad is None for p in teacher.parameters())
    assert teacher.training


def test_evaluation_is_left_alone_and_hooks_go_after_an_exception():
    student, teacher, _, (x, _) = pair()
    plain = forward.predict(student, x)
    with InnerDistillation(student, teacher, x):
        assert torch.equal(forward.predict(student, x), plain)
    with pytest.raises(RuntimeError), InnerDistillation(student, teacher, x):
        student(x[:, :, :, None])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_it_pulls_the_features_together():
    with rng.scope("pull"):
        teacher = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
        student = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
        x = torch.randn(64, 6)

    def distance():
        return float((student[:2](x) - teacher[:2](x)).detach().square().mean())

    before = distance()
    with InnerDistillation(student, teacher, x, at=["1"], weight=1.0):
        optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            (0 * student(x).sum()).backward()
            optimizer.step()
    assert distance() < 0.05 * before


def test_bad_points_are_refused():
    student, teacher, _, (x, _) = pair()
    with pytest.raises(UsageError, match="no such module"):
        InnerDistillation(student, teacher, x, at=["nowhere"])
    with pytest.raises(UsageError, match="negative"):
        InnerDistillation(student, teacher, x, weight=-1)
    with pytest.raises(UsageError, match="no tensor to compare"):
        InnerDistillation(nn.Linear(3, 2), nn.Linear(3, 2), torch.ones(4, 3))
    two = [nn.Sequential(nn.Conv2d(1, c, k), nn.Flatten(), nn.Linear(n, 2)) for c, k, n in ((3, 3, 27), (4, 1, 100))]
    with pytest.raises(BadModel, match="more than the number of channels"):
        InnerDistillation(*two, torch.ones(2, 1, 5, 5))
