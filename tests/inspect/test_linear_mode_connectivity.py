"""Two networks compared: barriers by hand, the control, and what each verdict needs."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from nervure import zoo
from nervure.core import similarity
from nervure.core.connectivity import line
from nervure.core.line_curvature import curvature_gaps, mean_loss
from nervure.core.permutation import PermutationGraph, permuted
from nervure.inspect.linear_mode_connectivity import compare_networks, layer_barriers, ridge


def trained(seed, *, steps=300, spread=6.0):
    """Return a small network that tells eight clusters apart, and their samples."""
    draw = torch.Generator().manual_seed(0)
    centres = spread * torch.randn(24, 5, generator=draw)
    y = torch.arange(480) % 24
    x = centres[y] + torch.randn(480, 5, generator=draw)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y % 8).backward()
        optimizer.step()
    return net, (x, y % 8)


FIRST, BATCH = trained(0)
SECOND, _ = trained(1)
COPY = copy.deepcopy(FIRST)
GRAPH = PermutationGraph.of(FIRST, BATCH[0][:2])


def test_a_permuted_copy_has_a_barrier_that_matching_removes():
    other = permuted(FIRST, GRAPH, GRAPH.random(seed=9))
    found = compare_networks(FIRST, BATCH, other=other)
    assert found.line.barrier > 0.3
    assert found.aligned.barrier < 1e-6
    assert found.matching.certificate == "exact"
    assert found.control > 0.3
    assert found.verdict == "ok"
    assert all(value == pytest.approx(1) for value in found.same_layers.values())


def test_two_starts_keep_a_barrier_whose_height_is_that_of_networks_written_out():
    found = compare_networks(FIRST, BATCH, other=SECOND, points=5)
    x, y = BATCH
    losses = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        w = [torch.lerp(a, b, share).detach() for a, b in zip(FIRST.parameters(), SECOND.parameters(), strict=True)]
        scores = ((x @ w[0].T + w[1]).relu() @ w[2].T + w[3]).relu() @ w[4].T + w[5]
        losses.append(float(F.cross_entropy(scores, y)))
    np.testing.assert_allclose(found.line.losses.numpy(), losses, rtol=1e-5)
    assert found.verdict == "warn"
    assert found.cka.shape == (3, 3)
    features = [[net[0](x), net[2](net[:2](x)), net(x)] for net in (FIRST, SECOND)]
    assert found.cka[1, 2].item() == pytest.approx(similarity.cka(features[0][1], features[1][2], estimator="unbiased"))


def test_what_cannot_be_told():
    wide = nn.Sequential(nn.Linear(5, 30), nn.ReLU(), nn.Linear(30, 8))
    found = compare_networks(FIRST, BATCH, other=wide)
    assert found.line is found.aligned is found.matching is None
    assert found.cka.shape == (3, 2)
    assert found.verdict == "cannot tell"
    # A task so easy that even the control has no barrier proves nothing.
    easy = compare_networks(FIRST, (BATCH[0], BATCH[1]), other=COPY, control=COPY)
    assert easy.control == 0
    assert easy.verdict == "cannot tell"
    # Nor does a loss that is not finite.
    found = compare_networks(FIRST, BATCH, other=SECOND)
    broken = replace(found.line, losses=found.line.losses * math.inf)
    assert replace(found, line=broken).verdict == "cannot tell"
    # Nor a network none of whose units may move, without a control.
    linear = nn.Linear(5, 24)
    assert compare_networks(linear, BATCH, other=copy.deepcopy(linear)).control is None


def test_batch_norm_is_recomputed_unless_said_otherwise():
    case = zoo.case("residual-conv")
    first, second = case.model(seed=0), case.model(seed=1)
    batch = case.batch(16)
    reports = {
        kind: compare_networks(first, batch, other=second, points=3, statistics=kind)
        for kind in ("kept", "interpolated", "recomputed")
    }
    for kind, found in reports.items():
        assert found.line.statistics == kind
    assert reports["recomputed"].line.losses[1] != reports["kept"].line.losses[1]
    assert reports["recomputed"].line.losses[0] == reports["kept"].line.losses[0]


def test_layers_move_alone_and_their_estimates_are_those_of_the_curvature():
    found = layer_barriers(FIRST, SECOND, BATCH, nodes=2, points=5)
    assert found.names == ("0", "2", "4")
    measure = mean_loss([BATCH], F.cross_entropy)
    back = line(SECOND, FIRST, measure, shares=5, parameters=["2"], statistics="kept")
    assert found.measured[1, 1].item() == pytest.approx(float(back.gaps[1:-1].max()), rel=1e-6)
    there = curvature_gaps(FIRST, SECOND, BATCH, nodes=2, points=5, parameters=["4"])
    assert found.estimated[2, 0].item() == pytest.approx(float(there[1:-1].max()), rel=1e-6)
    assert found.measured[2, 0] < 0  # the last layer alone is convex
    expected = spearmanr(found.measured.flatten(), found.estimated.flatten()).statistic
    assert found.rank_correlation == pytest.approx(expected)


def test_parameters_without_a_module_are_layers_too():
    case = zoo.case("raw-parameter")
    found = layer_barriers(case.model(seed=0), case.model(seed=1), case.batch(6), nodes=1, points=3)
    assert set(found.names) == {"fc1", "scale", "shift", "weight"}


def test_the_ridge_by_hand():
    spawn = copy.deepcopy(FIRST)
    left, right = (copy.deepcopy(spawn) for _ in range(2))
    with torch.no_grad():
        left[0].bias.add_(torch.eye(24)[0])
        right[0].bias.add_(torch.eye(24)[:2].sum(0))
    found = ridge(spawn, left, right, BATCH)
    assert found.cosine == pytest.approx(0.5**0.5)
    assert found.walked == pytest.approx((1, 2**0.5), rel=1e-5)
    measure = mean_loss([BATCH], F.cross_entropy)
    middle = copy.deepcopy(left)
    with torch.no_grad():
        middle[0].bias.lerp_(right[0].bias, 0.5)
    assert found.start == measure(spawn)
    assert found.height == pytest.approx(measure(middle) - (measure(left) + measure(right)) / 2, abs=1e-7)
    assert math.isnan(ridge(spawn, spawn, right, BATCH).cosine)
