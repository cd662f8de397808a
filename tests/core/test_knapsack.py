"""The knapsack against all subsets and scipy's integer programming."""

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from nervure._kit import UsageError
from nervure.core import knapsack as module
from nervure.core.knapsack import Knapsack, greedy_knapsack, knapsack


@pytest.mark.parametrize("seed", range(30))
def test_it_equals_the_best_of_all_subsets_at_every_capacity(seed):
    draw = np.random.default_rng(seed)
    count = int(draw.integers(1, 15))
    values, weights = draw.random(count).round(2), draw.integers(0, 12, count) * int(draw.integers(1, 9))
    subsets = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
    worth, heavy = subsets @ values, subsets @ weights
    table = Knapsack(values, weights, int(weights.sum()) + 3)
    for capacity in range(0, int(weights.sum()) + 3, 3):
        for chosen in (knapsack(values, weights, capacity), table.chosen(capacity)):
            assert weights[chosen].sum() <= capacity
            assert values[chosen].sum() == pytest.approx(worth[heavy <= capacity].max(), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_it_equals_integer_programming_and_beats_greedy(seed):
    draw = np.random.default_rng(seed)
    values, weights = draw.random(150), draw.integers(1, 200, 150) * 12
    capacity = int(0.4 * weights.sum())
    found = milp(-values, constraints=LinearConstraint(weights[None], ub=capacity), integrality=np.ones(150),
                 bounds=Bounds(0, 1), options={"mip_rel_gap": 0})  # fmt: skip
    reached = values[knapsack(values, weights, capacity)].sum()
    assert reached == pytest.approx(-found.fun, rel=1e-9)
    greedy = greedy_knapsack(values, weights, capacity)
    assert weights[greedy].sum() <= capacity
    assert values[greedy].sum() <= reached + 1e-12


def test_a_coarser_unit_keeps_within_the_capacity_and_near_the_best(monkeypatch):
    draw = np.random.default_rng(0)
    values, weights = draw.random(60), draw.integers(1_000, 100_000, 60)
    capacity = int(0.5 * weights.sum())
    best = values[knapsack(values, weights, capacity)].sum()
    monkeypatch.setattr(module, "CELLS", 60 * 5_000)
    coarse = Knapsack(values, weights, capacity)
    chosen = coarse.chosen(capacity)
    assert coarse.unit > 1
    assert weights[chosen].sum() <= capacity
    assert 0.98 * best <= values[chosen].sum() <= best


def test_nothing_fits_everything_fits_and_free_items():
    assert not knapsack([1.0, 2.0], [5, 6], 4).any()
    assert knapsack([1.0, 2.0], [5, 6], 100).all()
    assert knapsack([1.0, 2.0], [0, 6], 0).tolist() == [True, False]
    assert knapsack([], [], 3).shape == (0,)


def test_bad_items_are_refused():
    for values, weights, capacity in (([1.0], [0.5], 1), ([1.0, 2.0], [1], 1)):
        with pytest.raises(UsageError, match="whole weights"):
            knapsack(values, weights, capacity)
    for values, weights, capacity in (([-1.0], [1], 1), ([1.0], [-1], 1), ([np.nan], [1], 1), ([1.0], [1], -1)):
        with pytest.raises(UsageError, match="at least 0"):
            greedy_knapsack(values, weights, capacity)
