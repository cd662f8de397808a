"""The contests on representations, generalisation and delays against what must come out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from nervure.arena import delayed_generalisation, generalisation_measures, measure, shortcut_fixes, similarity
from nervure.arena.contest import Trial
from nervure.arena.generalisation_measures import Trained, granulated
from nervure.learn.shortcut_fixes import FIXES
from nervure.spec import Notes


def trial(contest, case, *, entrants=(), quick=False):
    (job,) = contest.plan(cases=[case], entrants=entrants, seeds=1, quick=quick)
    notes = Notes()
    measure(job, lambda share, text="": None, notes)
    assert not notes.warnings
    return {(one.arm, one.metric): one.value for one in notes.measurements if one.step is None}


def test_what_is_invariant_to_what_is_known():
    entrants = ["CKA", "CCA", "matched units", "RSA"]
    seen = {case: trial(similarity.CONTEST, case, entrants=entrants) for case in similarity.INVARIANCES}
    for case, invariant in (
        ("permuted", {"CKA", "CCA", "matched units", "RSA"}),
        ("rotated", {"CKA", "CCA", "RSA"}),
        ("scaled by unit", {"CCA", "matched units"}),
        ("mapped linearly", {"CCA"}),
    ):
        for name in entrants:
            exact = seen[case][name, "like"] > 1 - 1e-6
            assert exact == (name in invariant), (case, name)
            assert (seen[case][name, "auc"] == 1) or name not in invariant


def test_less_noise_is_more_alike_for_every_measure():
    found = trial(similarity.CONTEST, "less noise")
    assert all(found[name, "auc"] > 0.9 for name in similarity.MEASURES)


def test_granulated_agreement_by_hand():
    places = list(itertools.product((0, 1), (0, 1)))
    gaps = [1.0, 2.0, 3.0, 4.0]
    assert granulated([1.0, 2, 3, 4], gaps, places) == 1
    assert granulated([4.0, 3, 2, 1], gaps, places) == -1
    # Right along the first parameter, wrong along the second.
    assert granulated([2.0, 1, 4, 3], gaps, places) == 0


def _trained(model, x, y, start=None):
    return Trained(model, start or model, x, y, 0.0, (0,))


def test_measures_on_networks_with_known_values():
    linear = nn.Sequential(nn.Linear(3, 2, bias=False))
    linear[0].weight.data = torch.tensor([[1.0, 2, 0], [0, 3, 1]])
    x, y = torch.eye(3), torch.tensor([0, 1, 1])
    one = _trained(linear, x, y)
    assert generalisation_measures._path_norm(one) == pytest.approx(15**0.5)
    # Scores are columns of the weight: margins 1 / 1, 1 / sqrt 13, 1 / 1.
    margins = torch.tensor([1.0, 1 / 13**0.5, 1.0])
    assert generalisation_measures._margin(one) == pytest.approx(-float(margins.quantile(0.1)))
    moved = nn.Sequential(nn.Linear(3, 2, bias=False))
    moved[0].weight.data = linear[0].weight.data + torch.tensor([[3.0, 0, 0], [0, 0, 4]])
    assert generalisation_measures._distance(_trained(linear, x, y, moved)) == pytest.approx(5)


def test_noise_that_costs_accuracy_is_smaller_for_a_sharper_network():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(256, 3, generator=draw)
    wide, thin = (nn.Sequential(nn.Linear(3, 2, bias=False)) for _ in range(2))
    wide[0].weight.data = torch.tensor([[0.5, 0, 0], [-0.5, 0, 0]])
    thin[0].weight.data = wide[0].weight.data / 100
    y = (x[:, 0] <= 0).long()
    start = nn.Sequential(nn.Linear(3, 2, bias=False))
    start[0].weight.data.zero_()
    sharp, flat = (generalisation_measures._pac_bayes(_trained(net, x, y, start)) for net in (thin, wide))
    # A hundredth of the weights bears a hundredth of the noise; both noises are within the search's ends.
    assert 0.2 < sharp / flat < 5


def test_nobody_generalises_on_a_random_table_and_decay_does_on_addition():
    entrants = ["adamw, strong decay"]
    table = trial(delayed_generalisation.CONTEST, "random table", entrants=entrants, quick=True)
    assert {value for (_, metric), value in table.items() if metric == "time"} == {1.0}
    found = trial(delayed_generalisation.CONTEST, "addition", entrants=entrants)
    assert found["adamw, strong decay", "generalised"] == 1
    assert found["adamw, strong decay", "time"] < 1


def test_a_shortcut_costs_the_worst_group_and_all_remedies_take_part():
    found = trial(shortcut_fixes.CONTEST, "slabs", quick=True)
    assert {arm for arm, _ in found} == set(FIXES)
    assert found["erm", "clean"] > 0.9
    assert found["erm", "worst"] < 0.8


def test_the_groups_of_two_colours_are_all_four_and_moons_overlap():
    one = Trial("two colours", 0, (), False, lambda share, text: None, Notes())
    made = shortcut_fixes._colours(one)
    assert len(made.groups) == 4
    assert min(len(y) for _, y in made.groups.values()) > 300
    assert float(made.train[0].amin()) >= 0
    moons = shortcut_fixes._moons(one)
    line = (moons.train[0][:, 0] > moons.train[0][:, 0].median()).long()
    assert max(float((line == moons.train[1]).double().mean()), float((line != moons.train[1]).double().mean())) > 0.97
