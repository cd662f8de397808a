"""DHSPG against closed forms on a quadratic, exact counts, exact resumption; cut equals trained on the whole zoo."""

import copy

import pytest
import torch
from torch import nn

from nervure import zoo
from nervure._kit import BadBudget, Unsupported, UsageError
from nervure.compress import DHSPG, Otov2
from nervure.compress.zero_groups import ZeroGroups
from nervure.core import Meter, forward, rng
from nervure.core.channels import ChannelGraph
from nervure.core.cost import macs
from nervure.spec import Budget
from nervure.testing import ToyTask, toy_task


def layer(*, count=6, inputs=5, dtype=torch.float64):
    """A layer whose rows (with their biases) are the groups."""
    with rng.scope("layer"):
        net = nn.Sequential(nn.Linear(inputs, count), nn.ReLU(), nn.Linear(count, 2)).to(dtype)
    x = torch.ones(2, inputs, dtype=dtype)
    return net, ZeroGroups.of(net, ChannelGraph.of(net, x))


def rows(net):
    return torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach().clone()


def descend(net, target):
    """Set the gradient of half the squared distance to a target."""
    net.zero_grad()
    weight = torch.cat([net[0].weight, net[0].bias[:, None]], 1)
    (0.5 * (weight - target).square().sum()).backward()


def target(count=6, width=6):
    return torch.randn(count, width, generator=rng.generator("target"), dtype=torch.float64)


@pytest.mark.parametrize("left", [1, 2, 5])
def test_one_step_is_the_closed_form(left):
    """Written out for each row in turn; on a quadratic the base's step is rate * (a - x)."""
    net, groups = layer()
    a, x = target(), rows(net)
    optimizer = DHSPG(torch.optim.SGD(net.parameters(), lr=0.3), groups, target=3, warmup=0, steps=left)
    descend(net, a)
    optimizer.step()
    for row in range(6):
        s = 0.3 * (a[row] - x[row])
        trial = x[row] + s
        if optimizer.chosen[row]:
            unit = x[row] / x[row].norm()
            c = max(0.0, float(s @ unit + x[row].norm() / left))
            if s @ unit > 0:
                c = min(c, float(s @ unit + s @ s / (s @ unit)) / 2)
            trial = trial - c * unit
            if left == 1 or trial @ x[row] <= 0:
                trial = torch.zeros_like(trial)
        torch.testing.assert_close(rows(net)[row], trial, rtol=1e-10, atol=1e-12)
    assert int(optimizer.chosen.sum()) == 3


def test_the_move_goes_along_the_base_step_and_towards_zero():
    """<move, s> > 0 and <move, x> < 0 for every group that is still under way, over many draws."""
    seen = 0
    for draw in range(20):
        net, groups = layer(count=12)
        with torch.no_grad():
            net[0].weight.normal_(generator=rng.generator("start", draw))
        x = rows(net)
        a = 1.5 * x + torch.randn(12, 6, generator=rng.generator("end", draw), dtype=torch.float64)
        optimizer = DHSPG(torch.optim.SGD(net.parameters(), lr=0.1), groups, target=8, warmup=0, steps=10)
        descend(net, a)
        optimizer.step()
        under_way = optimizer.chosen & ~optimizer.zero
        move, s = (rows(net) - x)[under_way], (0.1 * (a - x))[under_way]
        grows = (s * x[under_way]).sum(1) > 0
        assert bool(((move * s).sum(1)[grows] > 0).all())
        assert bool(((move * x[under_way]).sum(1) < 0).all())
        seen += int(grows.sum())
    assert seen > 20


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_it_ends_at_the_quadratics_best_solution_with_so_many_zero_groups(kind):
    """The rows of the target that are smallest become zero, the others are met."""
    net, groups = layer()
    a = target() * torch.tensor([3.0, 0.1, 2.0, 0.2, 0.3, 4.0], dtype=torch.float64)[:, None]
    base = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.2),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    }[kind](net.parameters())
    optimizer = DHSPG(base, groups, target=3, warmup=400, steps=50)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99 ** max(0, step - 450))
    for _ in range(1500):
        descend(net, a)
        optimizer.step()
        schedule.step()
    best = a * torch.tensor([1, 0, 1, 0, 0, 1], dtype=torch.float64)[:, None]
    torch.testing.assert_close(rows(net), best, rtol=1e-5, atol=1e-5)
    assert optimizer.zero.tolist() == [False, True, False, True, True, False]


def test_groups_the_loss_lets_shrink_do_so_evenly_and_end_at_zero():
    net, groups = layer()
    optimizer = DHSPG(torch.optim.SGD(net.parameters(), lr=1e-6), groups, target=4, warmup=1, steps=10)
    start, away = rows(net).norm(dim=1), -rows(net)
    for taken in range(1, 12):
        descend(net, away)
        optimizer.step()
        share = (rows(net).norm(dim=1) / start)[optimizer.chosen]
        expected = 1.0 if taken == 1 else (11 - taken) / 10
        torch.testing.assert_close(share, torch.full_like(share, expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(optimizer.zero, optimizer.chosen)


def test_a_larger_epsilon_projects_earlier():
    when = []
    for epsilon in (0.0, 0.9):
        net, groups = layer()
        optimizer = DHSPG(
            torch.optim.SGD(net.parameters(), lr=1e-6), groups, target=4, warmup=0, steps=20, epsilon=epsilon
        )
        taken = 0
        while not optimizer.zero.any():
            descend(net, target())
            optimizer.step()
            taken += 1
        when.append(taken)
    assert when[1] < when[0]


@pytest.mark.parametrize("name", ["residual-conv", "u-net", "depthwise", "cat-chunk", "gru", "twice-used"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_count_is_exact_in_a_users_loop(name, share):
    case = zoo.case(name)
    model, (x, y) = case.model(), case.batch(8)
    graph = ChannelGraph.of(model, x)
    groups = ZeroGroups.of(model, graph)
    count = int(share * (len(groups) - len(groups.group.unique())))
    base = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    optimizer = DHSPG(base, groups, target=count, warmup=2, steps=4)
    for _ in range(10):
        optimizer.zero_grad()
        case.loss(model, (x, y)).backward()
        optimizer.step()
    weights = [one.detach() for one in groups.parameters]
    assert int((groups.dots(weights, weights) == 0).sum()) == int(optimizer.zero.sum()) == count


def test_groups_that_are_zero_already_go_first():
    net, groups = layer()
    with torch.no_grad():
        for row in (1, 4):
            net[0].weight[row], net[0].bias[row] = 0, 0
    optimizer = DHSPG(torch.optim.SGD(net.parameters(), lr=0.1), groups, target=2, warmup=0, steps=3)
    for _ in range(4):
        descend(net, target())
        optimizer.step()
    assert optimizer.zero.nonzero().flatten().tolist() == [1, 4]
    assert int((rows(net).norm(dim=1) == 0).sum()) == 2


def test_salience_is_relative_size_plus_cosine():
    net, groups = layer()
    descend(net, target())
    x, slope = rows(net), torch.cat([net[0].weight.grad, net[0].bias.grad[:, None]], 1)
    size = x.square().mean(1).sqrt()
    expected = size / size.mean() - (x * slope).sum(1) / x.norm(dim=1) / slope.norm(dim=1)
    optimizer = DHSPG(torch.optim.SGD(net.parameters(), lr=0.1), groups, target=2, warmup=0, steps=1)
    torch.testing.assert_close(optimizer.salience(), expected)


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_it_resumes_exactly_from_its_state(stop, tmp_path):
    def made():
        net, groups = layer()
        return net, DHSPG(torch.optim.Adam(net.parameters(), lr=0.05), groups, target=3, warmup=2, steps=4)

    def go(net, optimizer, steps):
        for _ in range(steps):
            descend(net, target())
            optimizer.step()

    whole, optimizer = made()
    go(whole, optimizer, 10)
    first, half = made()
    go(first, half, stop)
    torch.save({"net": first.state_dict(), "optimizer": half.state_dict()}, tmp_path / "state.pt")
    go(first, half, 1)
    second, other = made()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(state["net"])
    other.load_state_dict(state["optimizer"])
    go(second, other, 10 - stop)
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), second.parameters(), strict=True))
    assert torch.equal(optimizer.zero, other.zero)


def test_closures_schedulers_and_one_step_counted_once():
    net, groups = layer()
    optimizer = DHSPG(torch.optim.SGD(net.parameters(), lr=0.1), groups, target=2, warmup=0, steps=2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        descend(net, target())
        return torch.tensor(3.0)

    with Meter(track_saved=False) as meter:
        assert float(optimizer.step(closure)) == 3.0
        schedule.step()
        optimizer.step(closure)
    assert meter.steps == 2
    assert optimizer.base.param_groups[0]["lr"] == 0.05
    extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "lr": 1.0})
    assert optimizer.base.param_groups[1]["params"] == [extra]


class Plain(nn.Module):
    """Batch norms without scale and shift: a zero row of weights leaves the running mean's trace."""

    def __init__(self, *, affine):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6, affine=affine)
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(torch.relu(self.fc(x)))


def test_groups_that_do_not_vanish_are_left_out():
    x = torch.ones(2, 1, 5, 5)
    for affine, frozen, expected in ((True, (), {6, 8}), (False, (), {8}), (True, ("fc.bias",), {6})):
        model = Plain(affine=affine)
        nn.init.constant_(model.fc.bias, 0.5)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        graph = ChannelGraph.of(model, x)
        groups = ZeroGroups.of(model, graph)
        assert {graph.groups[int(number)].size for number in groups.group.unique()} == expected
    model.requires_grad_(False)
    with pytest.raises(Unsupported, match="vanishes"):
        ZeroGroups.of(model, ChannelGraph.of(model, x))


@pytest.mark.parametrize("name", [name for name in zoo.names() if name not in ("dict-tuple", "tied-lm")])
def test_cut_and_trained_network_give_the_same_outputs(name):
    case = zoo.case(name)
    model, task = case.model(), ToyTask(*case.batch(16))
    trained, keep, graph = Otov2().sparsify(model, task, Budget(target=0.6, metric="macs", steps=12), seed=0)
    cut = graph.cut(trained, keep)
    one = forward.take(task.inputs, slice(0, 1))
    assert macs(cut, one) <= 0.6 * macs(model, one)
    before, after = forward.predict(trained, task.inputs), forward.predict(cut, task.inputs)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert float((before - before.mean(0)).abs().max()) > 1e-3


def test_a_target_that_takes_channels_which_do_not_vanish_is_refused():
    case = zoo.case("tied-lm")
    model, task = case.model(), ToyTask(*case.batch(8))
    with pytest.raises(Unsupported, match="normalised over"):
        Otov2().fit(model, task, Budget(target=0.5, metric="macs", steps=4), seed=0)
    with pytest.raises(BadBudget, match="cannot be reached"):
        Otov2().fit(model, task, Budget(target=1e-6, metric="macs", steps=4), seed=0)


def test_a_task_that_takes_no_optimizer_and_too_few_steps_are_refused():
    class Own(ToyTask):
        def train(self, model, *, steps, part=0, after_step=None):
            super().train(model, steps=steps, part=part, after_step=after_step)

    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    toy = toy_task()
    with pytest.raises(Unsupported, match="no other optimizer"):
        Otov2().fit(net, Own(toy.inputs, toy.targets), Budget(target=0.5, metric="macs", steps=4), seed=0)
    with pytest.raises(BadBudget, match="prunes while it trains"):
        Otov2().fit(net, toy, Budget(target=0.5, metric="macs"), seed=0)
    assert Otov2().fit(net, toy, Budget(target=0.5, metric="params", steps=1), seed=0).steps == 1


def test_bad_arguments():
    net, groups = layer()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(BadBudget, match="cannot go"):
        DHSPG(base, groups, target=6, warmup=0, steps=1)
    with pytest.raises(UsageError, match="does not own"):
        DHSPG(torch.optim.SGD(copy.deepcopy(net).parameters(), lr=0.1), groups, target=1, warmup=0, steps=1)
    for wrong in ({"warmup": -1}, {"steps": 0}, {"epsilon": 1.0}):
        with pytest.raises(UsageError, match="out of range"):
            DHSPG(base, groups, target=1, **{"warmup": 0, "steps": 1, **wrong})
    with pytest.raises(UsageError, match="share of channels"):
        Otov2(least=2)
