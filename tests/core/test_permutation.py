"""Permutation graphs: every zoo model computes the same with its units in any order, and nothing else is allowed."""

import copy
import itertools

import pytest
import torch
from torch import nn

from nervure import zoo
from nervure._kit import BadModel, UsageError
from nervure.core import forward
from nervure.core.permutation import PermutationGraph, permuted


def graph_of(name):
    case = zoo.case(name)
    model = case.model(seed=0).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:  # scales and statistics that tell the channels apart
            if value.is_floating_point():
                value.add_(0.1 * torch.rand(value.shape, generator=draw))
    return model, PermutationGraph.of(model, case.batch(3)[0]), case.batch(5, seed=2)[0]


@pytest.mark.parametrize("name", zoo.names())
def test_any_order_computes_the_same_and_the_model_is_left_alone(name):
    model, graph, inputs = graph_of(name)
    before = copy.deepcopy(model.state_dict())
    for seed in range(3):
        permutations = graph.random(seed=seed)
        other = permuted(model, graph, permutations)
        expected, found = (forward.predict(one.double(), _double(inputs)) for one in (copy.deepcopy(model), other))
        assert float((expected - found).abs().max()) <= 1e-6 * float(expected.abs().max())
        assert bool(graph.groups) == any(
            not torch.equal(value.float(), before[key]) for key, value in other.state_dict().items()
        )
        back = graph.read(graph.orders(permutations))
        assert all(torch.equal(back[group], one) for group, one in permutations.items())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def _double(inputs):
    return forward.tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)


@pytest.mark.parametrize("name", zoo.names())
def test_every_group_matters_and_every_axis_is_in_a_group_or_pinned(name):
    model, graph, inputs = graph_of(name)
    for number, group in enumerate(graph.groups):
        ring = torch.arange(group.size).roll(1)
        assert not _same_weights(model, permuted(model, graph, {number: ring}))
        one = group.places[0]
        broken = copy.deepcopy(model)
        held = {**dict(broken.named_parameters()), **dict(broken.named_buffers())}
        order = one.order(ring, graph.lengths[one.tensor, one.axis])
        held[one.tensor].data.copy_(held[one.tensor].index_select(one.axis, order))
        assert not torch.allclose(forward.predict(broken, inputs), forward.predict(model, inputs), atol=1e-7)
    grouped = {(place.tensor, place.axis) for group in graph.groups for place in group.places}
    pinned = {(one.parameter, one.axis) for one in graph.pinned}
    kernels = {name for name, value in model.named_parameters() if value.ndim > 3}
    for tensor, value in model.named_parameters():
        for axis, length in enumerate(value.shape):
            spatial = tensor in kernels and axis > 1
            assert length == 1 or spatial or (tensor, axis) in grouped | pinned or axis == 1, (tensor, axis)


def _same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_sizes_of_the_groups_of_attention_are_those_of_its_symmetry():
    sizes = sorted(group.size for group in graph_of("encoder")[1].groups)
    # A stream of 16, two hidden layers of 32; in both layers two heads, with 8 queries and 8 values each.
    assert sizes == [2, 2, *[8] * 8, 16, 32, 32]
    assert sorted(group.size for group in graph_of("pre-activation")[1].groups) == [2, 2, 2, *[4] * 6]


def test_the_symmetries_of_a_small_network_are_all_found_by_brute_force():
    """Exactly the permutations of hidden rows that the graph allows leave the function alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.GroupNorm(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[1].weight.normal_()
        net[1].bias.normal_()
    x = torch.randn(6, 2, dtype=torch.float64)
    graph = PermutationGraph.of(net, x)
    allowed = set()
    options = [list(itertools.permutations(range(group.size))) for group in graph.groups]
    for choice in itertools.product(*options):
        orders = graph.orders({place: torch.tensor(one) for place, one in enumerate(choice)})
        allowed.add(tuple(orders["0.weight", 0].tolist()))
    truly = set()
    for order in itertools.permutations(range(4)):
        other = copy.deepcopy(net)
        where = torch.tensor(order)
        with torch.no_grad():
            for tensor, axis in ((other[0].weight, 0), (other[0].bias, 0), (other[1].weight, 0), (other[1].bias, 0),
                                 (other[3].weight, 1)):  # fmt: skip
                tensor.copy_(tensor.index_select(axis, where))
        if torch.allclose(net(x), other(x), atol=1e-12):
            truly.add(order)
    assert allowed == truly
    assert len(truly) == 8


class Positional(nn.Module):
    """A cumulative sum over channels: their order is part of the function, though no shape says so."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)).cumsum(1))


def test_a_group_whose_order_matters_is_pinned_and_said_so():
    graph = PermutationGraph.of(Positional(), torch.randn(4, 3))
    assert graph.groups == ()
    assert any("the order of its units" in one.why for one in graph.pinned)


class Halves(nn.Module):
    """Split channels in two halves that go separate ways."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(3, 8), nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x):
        a, b = self.stem(x).tanh().chunk(2, 1)
        return self.left(a) + self.right(b)


def test_halves_that_go_separate_ways_move_separately():
    graph = PermutationGraph.of(Halves(), torch.randn(4, 3))
    assert [group.size for group in graph.groups] == [4, 4]


def test_wrong_permutations_and_models_are_told():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    graph = PermutationGraph.of(net, torch.ones(1, 2))
    with pytest.raises(UsageError, match="no such group"):
        graph.orders({1: torch.arange(3)})
    with pytest.raises(UsageError, match="no permutation"):
        graph.orders({0: torch.tensor([0, 0, 1])})
    with pytest.raises(BadModel, match="not as the permutation graph saw it"):
        permuted(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), graph, graph.random(seed=0))
