import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nervure import zoo
from nervure._kit import BadModel, UsageError
from nervure.core import connectivity, masks


def ends(**options):
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        made.append(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).double())
    return made


def test_losses_on_the_line_are_those_of_networks_written_out():
    first, second = ends()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))
    found = connectivity.segment(first, second, lambda model: F.cross_entropy(model(x), y))
    for place, share in enumerate(torch.linspace(0, 1, 21, dtype=torch.float64)):
        pairs = zip(first.parameters(), second.parameters(), strict=True)
        w = [(1 - share) * a.detach() + share * b.detach() for a, b in pairs]
        scores = (x @ w[0].T + w[1]).relu() @ w[2].T + w[3]
        assert found[place].item() == pytest.approx(float(F.cross_entropy(scores, y)), rel=1e-12)


def test_barrier_and_connectivity_of_curves_by_hand():
    curve = torch.tensor([1.0, 4.0, 2.0, 3.0], dtype=torch.float64)
    assert connectivity.barrier(curve) == pytest.approx(4 - (1 + 2 / 3))
    assert connectivity.mode_connectivity(curve) == pytest.approx(2 - 4)
    valley = torch.tensor([3.0, 1.0, 3.0], dtype=torch.float64)
    assert connectivity.barrier(valley) == 0
    assert connectivity.mode_connectivity(valley) == 0


@pytest.mark.parametrize("name", zoo.names())
def test_half_way_to_itself_is_itself_and_the_ends_are_left_alone(name):
    case = zoo.case(name)
    model = case.model(seed=0)
    before = copy.deepcopy(model.state_dict())
    half = connectivity.interpolated(model, copy.deepcopy(model), 0.5)
    assert all(torch.equal(half.state_dict()[key], value) for key, value in before.items())
    other = case.model(seed=1)
    mixed = dict(connectivity.interpolated(model, other, 0.25).named_parameters())
    for (name_of, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mixed[name_of], 0.75 * one + 0.25 * two)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_masks_stay_in_force_between_masked_networks():
    first, second = ends()
    for model in (first, second):
        masks.attach(model, {"0.weight": torch.arange(54).view(9, 6) % 3 == 0})
    half = connectivity.interpolated(first, second, 0.3)
    assert int((half[0].weight == 0).sum()) == 36
    assert masks.read(half)["0.weight"].dtype == torch.bool


def test_statistics_between_are_those_of_the_batches():
    first, second = (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2))
    x, seen = torch.randn(64, 4), []

    def loss(model):
        seen.append((model, model[1].running_mean.clone()))
        return 0.0

    connectivity.segment(first, second, loss, points=3, batches=[x])
    middle, mean = seen[1]
    torch.testing.assert_close(mean, middle[0](x).mean(0))
    assert torch.equal(seen[0][1], torch.zeros(4))


def test_networks_of_two_shapes_have_no_line():
    with pytest.raises(BadModel, match="two shapes.*weight"):
        connectivity.interpolated(nn.Linear(3, 2), nn.Linear(4, 2), 0.5)
    with pytest.raises(BadModel, match="two shapes.*bias"):
        connectivity.interpolated(nn.Linear(3, 2), nn.Linear(3, 2, bias=False), 0.5)


def test_a_line_beyond_its_ends_is_the_exact_parabola_and_the_ends_are_the_networks():
    first, second = ends()

    def loss(model):
        return sum(value.detach().square().sum() for value in model.parameters())

    shares = [-0.5, 0.0, 0.3, 1.0, 1.25]
    found = connectivity.line(first, second, loss, shares=shares)
    for share, value in zip(shares, found.losses.tolist(), strict=True):
        pairs = zip(first.parameters(), second.parameters(), strict=True)
        expected = sum(float(((1 - share) * a + share * b).detach().square().sum()) for a, b in pairs)
        assert value == pytest.approx(expected, rel=1e-12)
    assert found.losses[1] == float(loss(first))
    assert found.losses[3] == float(loss(second))
    assert found.barrier == 0  # convex


def test_the_gap_and_the_bumpiness_by_hand():
    shares = torch.tensor([-0.5, 0.0, 0.5, 1.0], dtype=torch.float64)
    found = connectivity.Line(shares, torch.tensor([9.0, 2.0, 4.0, 1.0], dtype=torch.float64), "kept")
    assert found.gaps.tolist() == pytest.approx([9 - 2.5, 0, 4 - 1.5, 0])
    assert found.barrier == 2.5
    assert found.bumpiness == 2 / 1
    assert connectivity.bumpiness(torch.tensor([3.0, 2.0, 1.0])) == 0
    assert connectivity.bumpiness(torch.tensor([1.0, 2.0])) == float("inf")


def test_one_layer_moves_and_the_rest_stays():
    first, second = ends()
    seen = []
    connectivity.line(first, second, lambda model: seen.append(copy.deepcopy(model)) or 0.0, shares=3, parameters=["2"])
    for model, share in zip(seen, (0, 0.5, 1), strict=True):
        assert torch.equal(model[0].weight, first[0].weight)
        torch.testing.assert_close(model[2].weight, torch.lerp(first[2].weight, second[2].weight, share))
    with pytest.raises(UsageError, match="no parameter has this name"):
        connectivity.line(first, second, lambda model: 0.0, parameters=["nowhere"])


def test_a_tied_weight_moves_under_either_name():
    first, second = (zoo.case("tied-lm").model(seed=seed) for seed in range(2))
    for name in ("embed", "head"):
        mixed = connectivity.interpolated(first, second, 1.0, parameters=[name])
        assert torch.equal(mixed.head.weight, second.embed.weight)
        assert torch.equal(mixed.norm.weight, first.norm.weight)


def test_statistics_are_kept_mixed_or_recomputed():
    first, second = (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2))
    second[1].running_mean.fill_(2.0)
    x = torch.randn(64, 4)
    expected = {"kept": torch.zeros(4), "interpolated": torch.ones(4)}
    for statistics in ("kept", "interpolated", "recomputed"):
        seen = []

        def loss(model, seen=seen):
            seen.append((model[1].running_mean.clone(), model[0](x).mean(0).detach()))
            return 0.0

        found = connectivity.line(first, second, loss, shares=3, statistics=statistics, batches=[x])
        assert found.statistics == statistics
        torch.testing.assert_close(seen[1][0], expected.get(statistics, seen[1][1]))
    with pytest.raises(UsageError, match="nothing to recompute"):
        connectivity.line(first, second, loss, statistics="recomputed")
    with pytest.raises(UsageError, match="both networks"):
        connectivity.line(first, second, loss, shares=[0.0, 0.5])


def test_a_barrier_of_stale_statistics_vanishes_when_they_are_recomputed():
    """Two networks that differ by the scale of weights before a norm alone are one network."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)).double()
    x = torch.randn(400, 6, dtype=torch.float64)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second[0].weight.mul_(-1)
        second[0].bias.mul_(-1)
        second[1].weight.mul_(-1)
        first[0].weight.mul_(3)
    for model in (first, second):
        connectivity.reestimate_(model, [x])
        model.eval()
    y = first(x).argmax(1)

    def loss(model):
        model.eval()
        return F.cross_entropy(model(x) * 5, y)

    third = copy.deepcopy(first)
    with torch.no_grad():
        third[0].weight.div_(30)
        third[0].bias.div_(30)
    connectivity.reestimate_(third, [x])
    stale = connectivity.line(first, third, loss, statistics="kept")
    fresh = connectivity.line(first, third, loss, statistics="recomputed", batches=[x])
    assert stale.barrier > 0.1
    assert fresh.barrier < 1e-3
