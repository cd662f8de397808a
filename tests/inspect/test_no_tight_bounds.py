"""The floor by enumerating whole worlds; measures against their formulas; the draws against their law."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.stats
import torch
from torch import nn

from nervure._kit import BadData, UsageError
from nervure.inspect import generalisation_measures, rank_correlations, tightness_floor
from nervure.inspect._parity_worlds import draw
from nervure.inspect.no_tight_bounds import Measures, _calibrated


@pytest.mark.parametrize("samples", [0, 1, 2])
def test_the_floor_by_enumerating_every_sample_parity_and_learners_draw(samples):
    bits = 3
    every = list(itertools.product([0, 1], repeat=bits))

    def parity(a, x):
        return sum(p * q for p, q in zip(a, x, strict=True)) % 2

    # Law of (sample, hypothesis) and the error, for independent constraints: the first bits of the truth are seen.
    points = [tuple(int(i == j) for j in range(bits)) for i in range(samples)]
    seen: dict[tuple, dict[float, float]] = {}
    for world, truth in itertools.product("AB", every):
        labels = tuple(parity(truth, x) for x in points)
        fits = [a for a in every if tuple(parity(a, x) for x in points) == labels]
        for hypothesis in [truth] if world == "A" else fits:
            weight = 0.5 / len(every) / (1 if world == "A" else len(fits))
            error = 0.0 if hypothesis == truth else 0.5
            law = seen.setdefault((labels, hypothesis), {})
            law[error] = law.get(error, 0.0) + weight
    # The best guess at an absolute error is a median: one of the values themselves.
    best = sum(min(sum(p * abs(e - g) for e, p in law.items()) for g in law) for law in seen.values())
    assert best == pytest.approx(tightness_floor(bits, samples))


def test_the_floor_needs_a_world():
    assert tightness_floor(12, 12) == 0
    assert tightness_floor(12, 30) == 0
    with pytest.raises(UsageError, match="no such world"):
        tightness_floor(0, 3)


def test_draws_follow_their_law():
    found = draw(4000, bits=5, samples=3, source=torch.Generator().manual_seed(0))
    answers = (found.x * found.hypothesis.unsqueeze(1)).sum(2) % 2
    assert torch.equal(answers, found.y)
    assert torch.equal((found.x * found.truth.unsqueeze(1)).sum(2) % 2, found.y)
    assert not bool(found.error[~found.second].any())
    assert float(found.second.double().mean()) == pytest.approx(0.5, abs=0.03)
    # How many fit: 2^(d - rank), the rank over two elements found by elimination.
    for n in range(20):
        rows, rank = [int("".join(map(str, row)), 2) for row in found.x[n].tolist()], 0
        while rows:
            pivot = rows.pop()
            if pivot:
                rank += 1
                low = pivot & -pivot
                rows = [row ^ pivot if row & low else row for row in rows]
        assert int(found.fitting[n]) == 2 ** (5 - rank)
    # In the second world the hypothesis is the truth once in as many as fit.
    second = found.second
    assert float((found.error[second] == 0).double().mean()) == pytest.approx(
        float((1 / found.fitting[second].double()).mean()), abs=0.03
    )
    # The weight of the hypothesis has one law in both worlds.
    weights = found.hypothesis.sum(1)
    assert scipy.stats.ks_2samp(weights[second].numpy(), weights[~second].numpy()).pvalue > 1e-3
    assert found.floor == pytest.approx(float((0.25 * (1 - 1 / found.fitting.double())).mean()))


def test_measures_against_their_formulas():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(50, 4)
    with torch.no_grad():
        top = model(x).topk(2, 1)
        y = top.indices[:, 0]
        lead = (top.values[:, 0] - top.values[:, 1]).double()
    margin = float(lead.quantile(0.1))
    found = generalisation_measures(model, [(x[:30], y[:30]), (x[30:], y[30:])])
    assert found.training_error == 0
    assert found.norm == pytest.approx(sum(float(p.detach().square().sum()) for p in model.parameters()), rel=1e-6)
    assert found.negative_margin == pytest.approx(-margin, rel=1e-5)
    spectral = [float(torch.linalg.svdvals(layer.weight.detach())[0]) for layer in (model[0], model[2])]
    assert found.norm_by_margin == pytest.approx(math.log(spectral[0] * spectral[1] / margin), rel=1e-5)
    bound = math.sqrt((found.norm * found.inverse_noise / 2 + math.log(2 * math.sqrt(50) / 0.05)) / 100)
    assert bound <= found.pac_bayes <= bound + 0.1 + 1e-9
    assert found.inverse_noise > 1
    # Labels that are wrong everywhere have no margin.
    wrong = generalisation_measures(model, (x, (y + 1) % 3))
    assert wrong.training_error == 1
    assert wrong.negative_margin > 0
    assert wrong.norm_by_margin is None


def test_noise_that_a_scaled_network_tolerates_scales_with_it():
    torch.manual_seed(1)
    x = torch.randn(60, 3)
    one, ten = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        ten.weight.copy_(10 * one.weight)
    y = one(x).argmax(1)
    small, large = (generalisation_measures(each, (x, y)) for each in (one, ten))
    assert small.inverse_noise / large.inverse_noise == pytest.approx(100, rel=0.1)


def test_ranks_against_scipy_and_what_cannot_be_ranked():
    gaps = [0.1, 0.3, 0.2]
    sets = [Measures(0.0, norm, 1.0, margin, None, 2.0, 3.0) for norm, margin in ((1.0, 5.0), (3.0, 1.0), (2.0, 4.0))]
    found = rank_correlations(sets, gaps)
    assert found["norm"] == pytest.approx(1)
    assert found["norm_by_margin"] == pytest.approx(scipy.stats.kendalltau([5, 1, 4], gaps).statistic)
    assert math.isnan(found["sharpness"])
    with pytest.raises(BadData, match="as many gaps"):
        rank_correlations(sets, gaps[:2])
    with pytest.raises(BadData, match="no classes"):
        generalisation_measures(nn.Linear(2, 2), (torch.randn(4, 2), torch.randn(4, 2)))
    with pytest.raises(UsageError, match="no noise"):
        generalisation_measures(nn.Linear(2, 2), (torch.randn(4, 2), torch.zeros(4, dtype=torch.long)), draws=0)


def test_a_measure_alone_is_calibrated_to_the_median():
    import numpy as np

    known, errors = np.array([1.0, 1, 1, 2]), np.array([0.0, 0.5, 0.5, 0.0])
    assert _calibrated(known, errors, np.array([1.0, 2, 3])).tolist() == [0.5, 0.0, 0.25]
