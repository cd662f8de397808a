"""Scaling laws against known laws, scipy's fitter and sources of known entropy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import curve_fit
from torch import nn

from nervure._kit import BadData, UsageError
from nervure.inspect import fit_law, frontier, train_ladder
from nervure.inspect._ladder import Rung
from nervure.inspect._power_law import fit
from nervure.inspect._scaling_trial import code, cut, entropy_rate, language_model, markov, shuffled

X = np.geomspace(1e3, 1e6, 12)


def _law(x, floor=1.7, scale=4e3, exponent=0.45):
    return floor + (scale / x) ** exponent


@pytest.mark.parametrize("exponent", [0.05, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("floor", [0.0, 0.5, 3.0])
def test_an_exact_law_is_found(exponent, floor):
    law = fit_law(X, _law(X, floor=floor, exponent=exponent))
    assert law.exponent == pytest.approx(exponent, rel=2e-3)
    assert law.floor == pytest.approx(floor, abs=5e-3)
    assert law.at(1e7) == pytest.approx(_law(1e7, floor=floor, exponent=exponent), rel=2e-3)
    assert law.reducible(2e4) == pytest.approx((4e3 / 2e4) ** exponent, rel=1e-2)


def test_the_fit_is_the_minimum_that_scipy_finds():
    draw = np.random.default_rng(0)
    losses = _law(X) * np.exp(0.01 * draw.standard_normal(len(X)))
    ratio = X / np.exp(np.log(X).mean())
    ours = fit(ratio, losses[None], np.ones(len(X)))
    theirs, _ = curve_fit(lambda r, c, b, a: c + b * r**-a, ratio, losses, p0=(1, 1, 0.5), sigma=losses)
    assert (ours.floor[0], ours.factor[0], ours.exponent[0]) == pytest.approx(tuple(theirs), rel=1e-3)


def test_every_row_is_fitted_as_if_alone():
    draw = np.random.default_rng(1)
    ratio, rows = X / 3e4, _law(X)[None] * np.exp(0.02 * draw.standard_normal((5, len(X))))
    together = fit(ratio, rows, np.ones(len(X)))
    for place, row in enumerate(rows):
        alone = fit(ratio, row[None], np.ones(len(X)))
        assert alone.exponent[0] == together.exponent[place]
        assert alone.floor[0] == together.floor[place]


def test_intervals_hold_the_truth_as_often_as_they_say():
    x, held = np.repeat(X, 2), {"floor": 0, "exponent": 0}
    draw = np.random.default_rng(2)
    for trial in range(300):
        law = fit_law(x, _law(x) * np.exp(0.01 * draw.standard_normal(len(x))), draws=20, seed=trial)
        for name, truth in (("floor", 1.7), ("exponent", 0.45)):
            low, high = law.intervals[name]
            held[name] += low <= truth <= high
    assert min(held.values()) >= 0.85 * 300


def test_what_the_points_do_not_support_is_not_called_a_law():
    draw = np.random.default_rng(3)
    noise = np.exp(0.005 * draw.standard_normal(len(X)))
    assert fit_law(X, _law(X) * noise).verdict == "ok"
    power = fit_law(X, _law(X, floor=0.0) * noise)
    assert (power.best, power.verdict) == ("power", "cannot tell")
    flat = fit_law(X, 2.0 * noise)
    assert (flat.best, flat.verdict) == ("constant", "cannot tell")
    assert flat.at(1e7) == pytest.approx(2.0, rel=0.01)
    assert fit_law(X[:4], _law(X[:4])).verdict == "cannot tell"
    assert all(math.isnan(end) for end in fit_law(X[:3], _law(X[:3])).intervals["floor"])
    rising = fit_law(X, 2.0 + X / 1e7)
    assert rising.at(1e3) == pytest.approx(rising.at(1e6))


def test_an_outlier_moves_the_law_little():
    draw = np.random.default_rng(4)
    losses = _law(X) * np.exp(0.002 * draw.standard_normal(len(X)))
    losses[5] *= 1.3
    assert fit_law(X, losses).at(1e7) == pytest.approx(_law(1e7), rel=0.03)


def test_the_interval_of_a_prediction_holds_it_and_grows_away_from_the_points():
    draw = np.random.default_rng(5)
    law = fit_law(X, _law(X) * np.exp(0.01 * draw.standard_normal(len(X))))
    widths = []
    for x in (3e4, 1e8):
        low, high = law.between(x)
        assert low < law.at(x) < high
        widths.append(high - low)
    assert widths[1] > widths[0]


def _data():
    stream = torch.randint(5, (400,), generator=torch.Generator().manual_seed(0))
    source = cut(stream, 5, math.nan, held=100)
    return source.train, source.validation


def test_a_ladder_is_plain_training():
    train, validation = _data()
    rungs = train_ladder(language_model(5), [3, 6], train, validation, steps=20, batch_size=16, marks=3, seed=4)
    assert [rung.parameters for rung in rungs] == [64 * h + h + 5 * h + 5 for h in (3, 6)]
    assert [rung.macs for rung in rungs] == [64 * h + 5 * h for h in (3, 6)]
    assert rungs[0].symbols == (160, 224, 320)
    assert rungs[0].compute[-1] == 6 * 69 * 3 * 320
    again = train_ladder(language_model(5), [6], train, validation, steps=20, batch_size=16, marks=3, seed=4)
    assert again[0] == rungs[1]
    before = torch.get_rng_state()
    last = {}
    model = None

    def keep(size):
        nonlocal model
        model = language_model(5)(size)
        return model

    (rung,) = train_ladder(keep, [6], train, validation, steps=20, batch_size=16, marks=3, seed=4,
                           after_rung=lambda each: last.update({each.size: each.loss}))  # fmt: skip
    with torch.no_grad():
        assert rung.loss == pytest.approx(float(F.cross_entropy(model(validation[0]), validation[1])), rel=1e-5)
    assert last == {6: rung.loss}
    assert torch.equal(torch.get_rng_state(), before)


def test_sequences_count_every_symbol():
    class Each(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(5, width), nn.Linear(width, 5))

        def forward(self, x):
            return self.net(x)

    stream = torch.randint(5, (60, 9), generator=torch.Generator().manual_seed(0))
    data = stream[:, :8], stream[:, 1:]
    (rung,) = train_ladder(Each, [4], data, data, steps=10, batch_size=6, marks=1)
    assert (rung.parameters, rung.macs, rung.symbols) == (25, 20.0, (480,))


def test_the_frontier_of_known_curves():
    # L(N, D) = (A / N)^0.5 + (B / D)^0.5 at C = 6 N D: the best N grows as C^0.5.
    sizes = np.geomspace(1e3, 1e6, 25)
    symbols = np.geomspace(1e2, 1e9, 80)
    rungs = [
        Rung(round(n), round(n), n, tuple(symbols), tuple((1e3 / n) ** 0.5 + (1e4 / symbols) ** 0.5)) for n in sizes
    ]
    found = frontier(rungs, budgets=200)
    assert found.exponent == pytest.approx(0.5, abs=0.03)
    assert found.verdict == "ok"
    assert all(one >= two - 1e-12 for one, two in zip(found.losses, found.losses[1:], strict=False))
    few = frontier(rungs[:2])
    assert math.isnan(few.exponent)
    assert few.verdict == "cannot tell"
    with pytest.raises(BadData, match="no frontier"):
        frontier(rungs[:1])


def test_the_entropy_of_sources():
    # Next symbols that do not depend on the past: the entropy of one draw.
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert entropy_rate(p.expand(3, 3, 3)) == pytest.approx(1.5 * math.log(2))
    # A chain that mostly repeats its last symbol but one, by simulation.
    source = markov(torch.Generator().manual_seed(0), symbols=3, size=40_000)
    (contexts, following), _ = source.train, source.validation
    code_of = contexts[:, -2] * 3 + contexts[:, -1]
    counts = torch.zeros(9, 3, dtype=torch.float64)
    counts.index_put_((code_of, following), torch.ones(len(following), dtype=torch.float64), accumulate=True)
    rates = counts / counts.sum(1, keepdim=True)
    assert float(-(counts * rates.log()).sum() / counts.sum()) == pytest.approx(source.entropy, abs=0.01)
    text = code(torch.Generator().manual_seed(0), size=30_000)
    noise = shuffled(text, torch.Generator().manual_seed(1))
    assert torch.equal(text.train[0][1:, 0], text.train[0][:-1, 1])
    assert 2.5 < noise.entropy < 4.0


def test_refusals():
    with pytest.raises(BadData, match="no law"):
        fit_law([1, 1, 2], [3, 2, 1])
    with pytest.raises(BadData, match="no law"):
        fit_law([1, 2, 3], [3, 2, math.nan])
    with pytest.raises(UsageError, match="too few draws"):
        fit_law([1, 2, 3], [3, 2, 1], draws=2)
    train, validation = _data()
    with pytest.raises(UsageError, match="no such ladder"):
        train_ladder(language_model(5), [], train, validation)
