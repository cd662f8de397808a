"""Taylor scores against gates, choices against brute force over all sizes, fine-tuning under distillation."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nervure._kit import BadBudget, Unsupported, UsageError
from nervure.compress import KnapsackPruning, taylor
from nervure.compress.knapsack_pruning import KnapsackRecipe
from nervure.compress.structured import ChannelRecipe
from nervure.core.channels import ChannelGraph
from nervure.core.cost import macs
from nervure.spec import Budget
from nervure.testing import ToyTask, toy_task


class Gated(nn.Module):
    """Gates after every channel, before the activation."""

    def __init__(self, *, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 5, 3), nn.BatchNorm1d(5) if norm else nn.Identity()
        self.fc, self.head = nn.Linear(30, 7), nn.Linear(7, 3)
        self.gates = None

    def forward(self, x):
        h = self.norm(self.conv(x[:, None]))
        h = torch.relu(h if self.gates is None else h * self.gates[0][:, None])
        h = self.fc(h.flatten(1))
        return self.head(torch.relu(h if self.gates is None else h * self.gates[1]))


@pytest.mark.parametrize("norm", [False, True])
def test_scores_are_the_losses_gradients_by_gates_summed_over_batches(norm):
    torch.manual_seed(0)
    net = Gated(norm=norm)
    toy = toy_task(count=64)

    class Two(ToyTask):
        def batches(self, count):
            return [(self.inputs[:32], self.targets[:32]), (self.inputs[32:], self.targets[32:])][:count]

    task = Two(toy.inputs, toy.targets)
    graph = ChannelGraph.of(net, toy.inputs[:2])
    found = taylor(net, graph, task, Budget(target=0.5, metric="macs", calibration=2), 0)
    expected = [torch.zeros(5), torch.zeros(7)]
    net.train()
    for batch in task.batches(2):
        net.gates = (torch.ones(5, requires_grad=True), torch.ones(7, requires_grad=True))
        for total, slope in zip(expected, torch.autograd.grad(task.loss(net, batch), net.gates), strict=True):
            total += slope.abs()
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), two, rtol=1e-3, atol=1e-5)


def test_absolute_scores_are_sums_of_single_products():
    torch.manual_seed(0)
    net, task = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), toy_task()
    graph, budget = ChannelGraph.of(net, task.inputs[:2]), Budget(target=0.5, metric="macs")
    found = taylor(net, graph, task, budget, 0, reduce="absolute")[0]
    task.loss(net, task.batches(1)[0]).backward()
    expected = (net[0].weight * net[0].weight.grad).abs().sum(1) + (net[0].bias * net[0].bias.grad).abs()
    torch.testing.assert_close(found.float(), expected.detach())


def conv():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 6, 3), nn.ReLU(), nn.Conv1d(6, 5, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(20, 4), nn.ReLU(), nn.Linear(4, 3),
    )  # fmt: skip


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_the_choice_is_near_the_best_of_all_sizes_by_true_cost(target):
    """Values of one group are best from the top, so sizes of the three groups are all that is to be tried."""
    net, task = conv(), toy_task()
    x = task.inputs[:1]
    graph = ChannelGraph.of(net, task.inputs[:2])
    draw = torch.Generator().manual_seed(3)
    scores = [torch.rand(group.size, generator=draw, dtype=torch.float64) for group in graph.groups]
    wanted = target * macs(net, x)
    best = 0.0
    for sizes in itertools.product(*(range(1, group.size + 1) for group in graph.groups)):
        keep = {place: one.topk(size).indices for place, (one, size) in enumerate(zip(scores, sizes, strict=True))}
        if macs(graph.cut(net, keep), x) <= wanted:
            best = max(best, sum(float(one[keep[place]].sum()) for place, one in enumerate(scores)))
    slim = KnapsackRecipe(name="k", score=lambda *_: scores, when="post", least=0.0).fit(
        net, task, Budget(target=target, metric="macs"), seed=0
    )
    assert macs(slim.model, x) <= wanted
    assert sum(float(one[slim.keep[place]].sum()) for place, one in enumerate(scores)) >= 0.93 * best


def test_it_pays_for_cheap_channels_where_a_ranking_does_not():
    """Equal scores: the knapsack keeps many cheap channels, the ranking looks at scores alone."""
    net = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 3))
    task, budget = toy_task(), Budget(target=0.5, metric="macs")
    draw = torch.Generator().manual_seed(0)
    scores = [1 + 0.01 * torch.rand(size, generator=draw, dtype=torch.float64) for size in (40, 20)]

    def kept(recipe):
        return sum(int(flags.sum()) for flags in recipe.fit(net, task, budget, seed=0).keep.values())

    packed = kept(KnapsackRecipe(name="k", score=lambda *_: scores, when="post"))
    assert packed > kept(ChannelRecipe(name="r", score=lambda *_: scores, when="post"))


@pytest.mark.parametrize("metric", ["macs", "params", "bytes", "ms"])
@pytest.mark.parametrize("solver", ["exact", "greedy"])
def test_budgets_in_every_unit_are_met(metric, solver):
    net, task = conv(), toy_task()
    if metric == "ms":
        net = nn.Sequential(nn.Linear(8, 4000), nn.ReLU(), nn.Linear(4000, 800), nn.ReLU(), nn.Linear(800, 3))
    budget = Budget(target=0.6, metric=metric, steps=4)
    slim = KnapsackPruning(solver=solver, distil=0).fit(net, task, budget, seed=0)
    assert slim.steps == 4
    assert slim.rounds[-1] <= (0.6 if metric != "ms" else 0.9)  # a measured time is not measured twice alike


def test_distillation_needs_a_task_that_takes_an_optimizer():
    class Own(ToyTask):
        def train(self, model, *, steps, part=0, after_step=None):
            super().train(model, steps=steps, part=part, after_step=after_step)

    toy = toy_task()
    own, budget = Own(toy.inputs, toy.targets), Budget(target=0.5, metric="macs", steps=4)
    with pytest.raises(Unsupported, match="no other optimizer"):
        KnapsackPruning().fit(conv(), own, budget, seed=0)
    plain = KnapsackPruning(distil=0).fit(conv(), own, budget, seed=0).model
    inner = KnapsackPruning().fit(conv(), toy, budget, seed=0).model
    assert not all(torch.equal(one, two) for one, two in zip(plain.parameters(), inner.parameters(), strict=True))


def test_fine_tuning_keeps_the_features_nearer_to_the_parents():
    net, task = conv(), toy_task(count=128)
    task.train(net, steps=60)
    distance = []
    for weight in (0.0, 20.0):
        slim = KnapsackPruning(distil=weight, when="post").fit(
            net, task, Budget(target=0.6, metric="macs", steps=60), seed=0
        )
        x, y = (one[:5](task.inputs).movedim(1, -1).flatten(0, -2).detach() for one in (slim.model, net))
        fit = torch.linalg.lstsq(x, y).solution
        distance.append(float(F.mse_loss(x @ fit, y)))
    assert distance[1] < distance[0]


def test_bad_arguments():
    for wrong in ({"solver": "magic"}, {"reduce": "max"}, {"when": "never"}, {"distil": -1.0}):
        with pytest.raises(UsageError, match="no such option|negative"):
            KnapsackPruning(**wrong)
    with pytest.raises(BadBudget, match="trains twice"):
        KnapsackPruning().fit(conv(), toy_task(), Budget(target=0.5, metric="macs", steps=1), seed=0)
