"""Capacity against Cover's theorem, linear regression, known thresholds and a loop; and what must be flagged."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nervure._kit import BadData, UsageError
from nervure.arena.context import Context
from nervure.inspect import Capacity, Fit, capacity, effective_complexity
from nervure.inspect._capacity_trial import cnn, cover, mlp, parted, separable


def _until(bound):
    return lambda n: Fit(n, fitted=n <= bound, converged=True)


@pytest.mark.parametrize("bound", [0, 1, 7, 16, 100, 999])
def test_the_search_finds_any_threshold_and_looks_at_no_size_twice(bound):
    fits = capacity(_until(bound), start=16, most=1000, tolerance=1e-9)
    found = Capacity(tuple(fits), 10)
    assert found.samples == bound
    assert found.above == bound + 1
    assert len({fit.samples for fit in fits}) == len(fits)
    coarse = Capacity(tuple(capacity(_until(bound), start=16, most=1000)), 10)
    assert coarse.samples <= bound < coarse.above
    assert coarse.above <= max(1.2 * coarse.samples, coarse.samples + 1)


def test_a_lookup_table_has_no_bound():
    found = Capacity(tuple(capacity(_until(10**9), start=16, most=1000)), 0)
    assert (found.samples, found.above, found.verdict) == (1000, None, "cannot tell")


def test_covers_count_against_every_labelling_of_small_point_sets():
    # In the plane, with no bias, of 2^n labellings as many can be parted as the formula says, for any points.
    draw = torch.Generator().manual_seed(0)
    for n in (2, 3, 5):
        x = torch.randn(n, 2, generator=draw)
        angles = torch.linspace(0, 2 * math.pi, 20_001)[:-1]
        signs = (torch.stack([angles.cos(), angles.sin()], 1) @ x.T) > 0
        found = {tuple(row) for row in signs.tolist()}
        assert len(found) / 2**n == pytest.approx(parted(n, 2))
        assert found <= set(itertools.product([True, False], repeat=n))
    assert parted(int(cover(20)), 20) == pytest.approx(0.5)


def test_a_linear_programme_reaches_covers_capacity():
    assert separable(Context("test", 0), inputs=20) == pytest.approx(cover(20), rel=0.1)


def test_logistic_regression_comes_near_covers_capacity():
    draw = torch.Generator().manual_seed(0)
    found = []
    for seed in range(3):
        x = torch.randn(120, 10, generator=draw)
        y = torch.randint(2, (120,), generator=draw)
        model = nn.Linear(10, 2, bias=False)
        with torch.no_grad():
            model.weight.zero_()
        one = effective_complexity(
            model, (x, y), epochs=80, rounds=3, start=8, tolerance=0.1, seed=seed, batch_size=200,
            optimizer=lambda each: torch.optim.Adam(each, lr=0.3),
        )  # fmt: skip
        assert one.verdict == "ok"  # the loss is convex: a failure is one of the model
        found.append(one.samples)
    assert sum(found) / 3 == pytest.approx(cover(10), rel=0.3)


def test_linear_regression_fits_as_many_targets_as_it_has_inputs():
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 6, generator=draw).double(), torch.randn(40, 1, generator=draw).double()
    model = nn.Linear(6, 1, bias=False).double()
    found = effective_complexity(
        model, (x, y), loss=F.mse_loss, epochs=60, rounds=4, start=3, tolerance=0.01, batch_size=100,
        optimizer=_BarzilaiBorwein,
        right=lambda output, target: (output - target).abs().flatten(1).amax(1) < 1e-4,
    )  # fmt: skip
    assert found.samples == 6
    assert found.verdict == "ok"


class _BarzilaiBorwein(torch.optim.Optimizer):
    """Take gradient steps whose rate follows the curvature just seen: fast on a quadratic."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.last = None

    @torch.no_grad()
    def step(self):
        (weight,) = self.param_groups[0]["params"]
        here, slope = weight.clone(), weight.grad.clone()
        rate = 0.01
        if self.last is not None:
            moved, turned = here - self.last[0], slope - self.last[1]
            rate = float((moved * moved).sum() / (moved * turned).sum().clamp_min(1e-300))
        self.last = (here, slope)
        weight -= min(rate, 100.0) * slope


def test_the_model_is_as_it_was_and_the_number_is_what_a_plain_loop_gives():
    draw = torch.Generator().manual_seed(2)
    x, y = torch.randn(60, 1, 8, 8, generator=draw), torch.randint(10, (60,), generator=draw)
    model = mlp(torch.Generator().manual_seed(0))
    before = copy.deepcopy(model.state_dict())
    found = effective_complexity(model, (x, y), epochs=40, rounds=1, start=60)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.parameters == 1810
    assert sum(value.numel() for value in cnn(torch.Generator()).parameters()) == 80 + 584 + 1290
    twin = copy.deepcopy(model)
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.005)
    for _ in range(80):
        for part in torch.arange(60).split(32):
            optimizer.zero_grad()
            F.cross_entropy(twin(x[part]), y[part]).backward()
            optimizer.step()
    assert bool((twin(x).argmax(1) == y).all())
    assert found.samples == 60
    assert found.verdict == "cannot tell"


def test_training_cut_short_is_flagged_and_not_taken_for_low_capacity():
    draw = torch.Generator().manual_seed(3)
    x, y = torch.randn(200, 1, 8, 8, generator=draw), torch.randint(10, (200,), generator=draw)
    short = effective_complexity(mlp(draw), (x, y), epochs=3, rounds=1, start=50)
    assert short.above is not None
    assert short.verdict == "cannot tell"
    assert not any(fit.converged for fit in short.fits if not fit.fitted)


def test_refusals():
    model = nn.Linear(3, 2)
    with pytest.raises(BadData, match="no classes"):
        effective_complexity(model, (torch.randn(20, 3), torch.randn(20, 2)), loss=F.mse_loss)
    with pytest.raises(UsageError, match="numbers above 0"):
        effective_complexity(model, (torch.randn(20, 3), torch.zeros(20, dtype=torch.long)), epochs=0)
    with pytest.raises(UsageError, match="1 <= start"):
        capacity(_until(3), start=0, most=10)
