"""Shuffled feature groups by loops, Sobol indices in closed form, and areas against scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from nervure._kit import BadData, UsageError
from nervure.core.feature_groups import Answers, cycle, default_groups, masks, shuffled


def test_a_group_moves_as_one_and_the_rest_stays():
    x = {"left": torch.arange(24.0).view(6, 4), "right": torch.arange(12).view(6, 2), "shared": torch.eye(3)}
    group = masks(x, {"g": {"left": [0, 2], "right": [1]}})["g"]
    order = cycle(6, seed=3)
    moved, rest = shuffled(x, group, order), shuffled(x, group, order, rest=True)
    for n in range(6):
        m = int(order[n])
        assert moved["left"][n].tolist() == [x["left"][m, 0], x["left"][n, 1], x["left"][m, 2], x["left"][n, 3]]
        assert rest["left"][n].tolist() == [x["left"][n, 0], x["left"][m, 1], x["left"][n, 2], x["left"][m, 3]]
        assert moved["right"][n].tolist() == [x["right"][n, 0], x["right"][m, 1]]
        assert rest["right"][n].tolist() == [x["right"][m, 0], x["right"][n, 1]]
    assert moved["shared"] is x["shared"]
    assert rest["shared"] is x["shared"]


def test_a_part_that_a_group_does_not_name_stays_or_moves_whole():
    x = (torch.arange(5.0).view(5, 1), torch.arange(5).view(5, 1))
    order = cycle(5)
    group = masks(x, {"first": {0: ...}})["first"]
    assert torch.equal(shuffled(x, group, order)[1], x[1])
    assert torch.equal(shuffled(x, group, order)[0], x[0][order])
    assert torch.equal(shuffled(x, group, order, rest=True)[1], x[1][order])
    assert torch.equal(shuffled(x, group, order, rest=True)[0], x[0])


@pytest.mark.parametrize("count", [2, 3, 17])
def test_the_order_is_one_cycle_through_all(count):
    order, at, seen = cycle(count, seed=1).tolist(), 0, []
    for _ in range(count):
        seen.append(at)
        at = order[at]
    assert at == 0
    assert sorted(seen) == list(range(count))


def test_default_groups():
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(200, 4, generator=draw)
    table[:, 3] = -table[:, 1].exp()
    assert list(default_groups(table)) == ["column 0", "columns 1, 3", "column 2"]
    wide = default_groups(torch.randn(200, 100, generator=draw))
    assert len(wide) == 32
    assert torch.stack([mask[""] for mask in wide.values()]).sum(0).tolist() == [1] * 100
    image = default_groups(torch.zeros(2, 3, 10, 8))
    regions = torch.stack([mask[""] for name, mask in image.items() if "row" in name])
    channels = torch.stack([mask[""] for name, mask in image.items() if "channel" in name])
    assert len(regions) == 16
    assert len(channels) == 3
    assert bool((regions.sum(0) == 1).all())
    assert bool((channels.sum(0) == 1).all())
    assert len(default_groups(torch.zeros(2, 1, 3, 3))) == 9
    assert len(default_groups(torch.zeros(2, 7, dtype=torch.long))) == 7
    tokens = default_groups(torch.zeros(2, 100, 5))
    assert len(tokens) == 32
    assert "positions 0-3" in tokens
    parts = default_groups({"a": torch.zeros(4, 2), "b": torch.zeros(4, 3), "shared": torch.zeros(9)})
    assert list(parts) == ["a", "b"]
    lone = default_groups({"ids": torch.zeros(4, 2, dtype=torch.long)})
    assert list(lone["position 1"]) == ["ids"]


def test_what_cannot_be_grouped():
    with pytest.raises(BadData, match="one group"):
        default_groups(torch.zeros(5, 1))
    with pytest.raises(UsageError, match="empty"):
        masks(torch.zeros(5, 3), {"none": []})
    with pytest.raises(UsageError, match="outside"):
        masks(torch.zeros(5, 3), {"far": [3]})
    with pytest.raises(UsageError, match="names no part"):
        masks({"a": torch.zeros(5, 3)}, {"b": {"b": [0]}})
    with pytest.raises(UsageError, match="does not fit"):
        masks(torch.zeros(5, 3), {"m": torch.ones(4, dtype=torch.bool)})
    with pytest.raises(BadData, match="one sample"):
        cycle(1)


def test_change_is_the_total_sobol_index():
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(40_000, 3, generator=draw, dtype=torch.float64) - 0.5
    order = cycle(len(x), seed=2)
    y = torch.arange(len(x)) % 2

    def change(function, columns, **how):
        answers = Answers(function(x), y, resamples=2)
        return answers.change(function(shuffled(x, masks(x, {"g": columns})["g"], order, **how))).value

    def additive(z):
        return z @ torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)

    assert change(additive, [0]) == pytest.approx(9 / 14, abs=0.02)
    assert change(additive, [1, 2]) == pytest.approx(5 / 14, abs=0.02)
    assert change(additive, [0], rest=True) == pytest.approx(5 / 14, abs=0.02)

    def product(z):  # f = a + 4 b c: variances 1/12 and 16 / 144
        return z[:, 0] + 4 * z[:, 1] * z[:, 2]

    whole = 1 / 12 + 16 / 144
    assert change(product, [1]) == pytest.approx(16 / 144 / whole, abs=0.02)
    assert change(product, [1, 2]) == pytest.approx(16 / 144 / whole, abs=0.02)
    assert change(product, [1], rest=True) == pytest.approx(1, abs=0.02)
    assert change(product, [0, 1, 2]) == pytest.approx(1, abs=0.02)


def test_areas_and_accuracies_against_scikit_learn_on_every_resample():
    draw = torch.Generator().manual_seed(2)
    y = torch.randint(3, (60,), generator=draw)
    scores = (torch.randn(60, 3, generator=draw) + torch.nn.functional.one_hot(y, 3)).round(decimals=1)
    answers = Answers(scores, y, resamples=20, seed=4)
    chances = scores.double().softmax(1)

    def truth(rows):
        return roc_auc_score(y[rows], chances[rows], multi_class="ovr")

    every = torch.arange(60)
    assert answers.auc(scores).value == pytest.approx(truth(every), abs=1e-12)
    resamples = [every.repeat_interleave(weights.long()) for weights in answers.counts]
    assert [len(rows) for rows in resamples] == [60] * 20
    areas = torch.tensor([truth(rows) for rows in resamples])
    assert answers.auc(scores).low == pytest.approx(float(areas.quantile(0.025)), abs=1e-6)
    assert answers.auc(scores).high == pytest.approx(float(areas.quantile(0.975)), abs=1e-6)
    right = (scores.argmax(1) == y).double()
    found = answers.accuracy(scores)
    assert found.value == pytest.approx(float(right.mean()))
    assert found.low == pytest.approx(float(torch.stack([right[r].mean() for r in resamples]).quantile(0.025)))
    two = torch.randint(2, (60,), generator=draw)
    odds = torch.randn(60, generator=draw).round(decimals=1)
    assert Answers(odds, two).auc(odds).value == pytest.approx(roc_auc_score(two, odds), abs=1e-12)
    assert Answers(odds.view(-1, 1), two).auc(odds.view(-1, 1)).value == pytest.approx(roc_auc_score(two, odds))


def test_sequences_count_positions_and_resample_samples():
    draw = torch.Generator().manual_seed(3)
    scores, y = torch.randn(10, 4, 3, generator=draw), torch.randint(3, (10, 4), generator=draw)
    y[0, :2] = -100
    answers = Answers(scores, y, resamples=7)
    counted = y >= 0
    assert answers.accuracy(scores).value == pytest.approx(
        float((scores.argmax(-1) == y)[counted].double().mean()), abs=1e-12
    )
    truth = roc_auc_score(y[counted], scores[counted].double().softmax(1), multi_class="ovr")
    assert answers.auc(scores).value == pytest.approx(truth, abs=1e-12)
    assert answers.change(scores).value == 0
    assert answers.change(scores + 5).value == pytest.approx(0, abs=1e-9)


def test_the_interval_covers():
    inside = 0
    for seed in range(100):
        draw = torch.Generator().manual_seed(seed)
        y = torch.arange(200) % 2
        found = Answers(y + torch.randn(200, generator=draw), y, seed=seed)
        estimate = found.auc(y + torch.randn(200, generator=draw))
        inside += estimate.low <= 0.5 * (1 + math.erf(0.5)) <= estimate.high
    assert 88 <= inside <= 99


def test_targets_that_cannot_be_scored():
    with pytest.raises(BadData, match="cannot be scored"):
        Answers(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))
    with pytest.raises(BadData, match="cannot be scored"):
        Answers(torch.zeros(4, 2), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(BadData, match="do not fit"):
        Answers(torch.zeros(4, 3), torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(BadData, match="not finite"):
        Answers(torch.full((4, 3), math.nan), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(BadData, match="not classes"):
        Answers(torch.zeros(4, 3), torch.tensor([0.5, 1, 2, 0]))
