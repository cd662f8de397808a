import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from nervure.stats import anytime_interval, power, t_interval
from nervure.stats.intervals import anytime_critical


@pytest.mark.parametrize("n", [2, 3, 5, 20, 200])
def test_t_interval_is_scipys_paired_one(n):
    rng = np.random.default_rng(n)
    method, control = rng.normal(0.3, 2, (4, n)), rng.normal(0, 1, (4, n))
    ours = t_interval(method - control)
    theirs = stats.ttest_rel(method, control, axis=-1).confidence_interval(0.95)
    np.testing.assert_allclose(ours.low, theirs.low, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(ours.high, theirs.high, rtol=1e-12, atol=1e-13)


def test_one_difference_gives_no_interval():
    for interval in (t_interval([0.3]), anytime_interval([0.3])):
        assert interval.mean == 0.3
        assert interval.low == -np.inf
        assert interval.high == np.inf


@pytest.mark.parametrize("value", [0.1, -1 / 3, 0.0, 1e300, 1e-300])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_equal_differences_give_exactly_the_point(value, n):
    interval = t_interval([value] * n)
    assert interval.low == interval.mean == interval.high == value


def test_equal_differences_are_not_decided_too_early():
    assert anytime_interval([0.1] * 3).low == -np.inf
    assert anytime_interval([0.1] * 9).low == 0.1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.floats(-1e3, 1e3))
def test_intervals_move_with_the_data(values, shift):
    for interval in (t_interval, anytime_interval):
        low, moved = interval(values).low, interval(np.array(values) + shift).low
        assert low == moved or abs(low + shift - moved) < 1e-6
        np.testing.assert_allclose(interval(values).high, -interval(-np.array(values)).low, atol=1e-8)


@pytest.mark.parametrize("n", [5, 6, 10, 60])
def test_anytime_critical_value_is_where_the_bayes_factor_is_20(n):
    # Independent of the closed form: the Bayes factor as an integral over effect sizes of noncentral t densities.
    t = anytime_critical(n)

    effects = np.linspace(-9, 9, 8001)
    weighted = stats.nct.pdf(t, n - 1, effects * np.sqrt(n)) * stats.norm.pdf(effects)
    marginal = integrate.simpson(weighted, x=effects)
    assert marginal / stats.t.pdf(t, n - 1) == pytest.approx(20, rel=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_anytime_interval_is_infinite_at_first(n):
    assert anytime_critical(n) == np.inf


@pytest.mark.parametrize(("effect", "n"), [(0.0, 3), (0.5, 10), (1.0, 5), (2.0, 5), (-1.0, 5)])
def test_power_is_what_a_simulation_finds(effect, n):
    draws = np.random.default_rng(0).normal(effect, 1, (40_000, n))
    share = (t_interval(draws).low >= 0).mean()
    assert float(power(effect, n)) == pytest.approx(share, abs=4 * np.sqrt(0.25 / 40_000))
    noncentral = stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, effect * np.sqrt(n))
    assert float(power(effect, n)) == pytest.approx(noncentral, abs=1e-6)


def test_power_broadcasts():
    assert power([[0.5], [1.0]], [3, 5, 10]).shape == (2, 3)
