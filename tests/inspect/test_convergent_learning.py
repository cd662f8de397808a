"""Matches against numpy, against brute force over permutations, and planted ones."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from nervure import zoo
from nervure._kit import BadData, UsageError
from nervure.core.features import features, units
from nervure.core.permutation import PermutationGraph, permuted
from nervure.inspect.convergent_learning import compare_units, match_units


def pair():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(2)]


def test_correlations_in_batches_are_those_of_numpy_and_the_matching_is_the_best_of_all():
    first, second = pair()
    x = torch.randn(300, 4)
    found = match_units(first, [(x[:100], None), (x[100:], None)], other=second).matches["0"]
    with torch.no_grad():
        expected = np.corrcoef(first[0](x).T, second[0](x).T)[:5, 5:]
    np.testing.assert_allclose(found.correlations.numpy(), expected, atol=1e-6)
    best = max(expected[range(5), order].mean() for order in itertools.permutations(range(5)))
    assert found.mean == pytest.approx(best, abs=1e-6)
    np.testing.assert_allclose(found.best.numpy(), expected.max(1), atol=1e-6)
    assert found.shared_matches == pytest.approx(expected.max(1).mean() - best, abs=1e-6)
    assert found.matched.tolist() == pytest.approx(found.correlations[range(5), found.partner].tolist())
    assert found.share_above(0.2) == float((found.matched > 0.2).double().mean())


@pytest.mark.parametrize("name", ["mlp", "residual-conv", "vit", "encoder", "lstm"])
def test_a_permuted_copy_has_correlation_one_in_every_layer(name):
    case = zoo.case(name)
    model = case.model()
    graph = PermutationGraph.of(model, case.batch(2)[0])
    other = permuted(model, graph, graph.random(seed=1))
    found = match_units(model, case.batch(64), other=other, clusters=0)
    assert found.matches
    for one in found.matches.values():
        assert float(one.matched.min()) == pytest.approx(1, abs=1e-6)
        assert one.chance < 0.9


def test_the_order_of_a_permuted_copy_is_found():
    first, _ = pair()
    order = torch.tensor([3, 1, 4, 0, 2])
    graph = PermutationGraph.of(first, torch.ones(2, 4))
    found = match_units(first, (torch.randn(200, 4), None), other=permuted(first, graph, {0: order}))
    assert torch.equal(order[found.matches["0"].partner], torch.arange(5))
    assert found.verdict == "ok"


def test_other_widths_and_silent_units():
    x = torch.randn(400, 3)
    y = torch.cat([x[:, 1:2] * 2, torch.ones(400, 1), -x[:, :1], x[:, :1] + x[:, 2:]], 1)
    found = compare_units(x, y, clusters=2)
    assert found.units == (3, 4)
    assert not found.correlations[:, 1].any()
    assert found.partner.tolist()[1] == 0
    assert 1 not in found.partner.tolist()
    assert found.clusters[3 + 1] == -1
    assert found.sources.tolist()[0] == 1  # the first varying unit of y is unit 1 of x alone
    assert found.sources.tolist()[2] == 2
    assert found.subspace == pytest.approx(1, abs=1e-6)
    assert compare_units(torch.ones(9, 2), y[:9]).mean == 0


def test_the_subspace_score_is_the_corrected_multiple_correlation():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(200, 6, generator=draw, dtype=torch.float64)
    y = x @ torch.randn(6, 4, generator=draw, dtype=torch.float64) + 2 * torch.randn(200, 4, generator=draw)
    found = compare_units(x, y, clusters=0).subspace
    a = np.column_stack([x.numpy(), np.ones(200)])
    left = y.numpy() - a @ np.linalg.lstsq(a, y.numpy(), rcond=None)[0]
    r2 = 1 - left.var(0) / y.numpy().var(0)
    expected = np.sqrt(1 - (1 - r2) * 199 / (200 - 6 - 1)).mean()
    assert found == pytest.approx(expected, rel=1e-9)


def test_verdicts():
    first, second = pair()
    assert match_units(first, (torch.randn(400, 4), None), other=second).verdict == "ok"
    assert match_units(first, (torch.randn(40, 4), None), other=second).verdict == "cannot tell"
    found = match_units(first, (torch.randn(400, 4), None), other=second)
    unrelated = compare_units(torch.randn(400, 4), torch.randn(400, 4))
    assert replace(found, matches={"0": unrelated}).verdict == "warn"


def test_layers_of_other_names_are_paired_by_hand():
    first, _ = pair()
    other = nn.Sequential(nn.Linear(4, 9))
    found = match_units(first, (torch.randn(200, 4), None), other=other, names={"2": "0"})
    assert found.matches["2"].layers == ("2", "0")
    assert found.matches["2"].correlations.shape == (3, 9)
    with pytest.raises(UsageError, match="no such layer"):
        match_units(first, (torch.randn(20, 4), None), other=other, names=["2"])
    with pytest.raises(UsageError, match="penalty"):
        match_units(first, (torch.randn(20, 4), None), other=other, penalty=0)


def test_maps_of_other_sizes_do_not_fit():
    one, other = (nn.Sequential(nn.Conv2d(1, 2, size)) for size in (1, 3))
    with pytest.raises(BadData, match="another number of samples"):
        match_units(one, (torch.randn(20, 1, 5, 5), None), other=other)


def test_positions_of_images_are_samples():
    torch.manual_seed(0)
    one, other = (nn.Sequential(nn.Conv2d(1, 3, 2)) for _ in range(2))
    x = torch.randn(30, 1, 5, 5)
    found = match_units(one, (x, None), other=other, clusters=0).matches["0"]
    assert found.samples == 30 * 16
    sides = [units(features(net, x, ["0"])["0"], net[0]).numpy() for net in (one, other)]
    np.testing.assert_allclose(found.correlations.numpy(), np.corrcoef(*(side.T for side in sides))[:3, 3:], atol=1e-6)
