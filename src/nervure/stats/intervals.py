"""Intervals of a mean paired difference, for any number of claims at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array = NDArray[np.float64]
LEVEL = 0.95
EFFECT_SCALE = 1.0


class Interval(NamedTuple):
    """Hold a mean and the ends of its interval, as arrays of one shape."""

    mean: Array
    low: Array
    high: Array


def t_interval(differences: ArrayLike, *, level: float = LEVEL) -> Interval:
    r"""Return Student's t interval of the mean over the last axis.

    .. math:: \bar d \pm t_{n-1,\,(1+\text{level})/2}\; s / \sqrt n

    One difference gives an infinite interval; two or more equal ones give the point itself.

    Args:
        differences: Paired differences, shape (..., n) with n >= 1.
        level: Coverage, in (0, 1).

    Returns:
        The interval, shape (...).

    Examples:
        >>> low, high = t_interval([0.8, 1.0, 1.2])[1:]
        >>> round(float(low), 3), round(float(high), 3)
        (0.503, 1.497)
    """
    mean, error, n = _mean_and_error(differences)
    width = _half_width(error, special.stdtrit(n - 1, (1 + level) / 2) if n > 1 else np.inf)
    return Interval(mean, mean - width, mean + width)


def anytime_interval(differences: ArrayLike, *, level: float = LEVEL, effect_scale: float = EFFECT_SCALE) -> Interval:
    r"""Return the interval at time n of a confidence sequence: it may be looked at after every seed.

    The set of means m which the mixture t test does not reject. With a normal prior of standard deviation
    :math:`\tau` on the effect size :math:`(\mu-m)/\sigma` and the right Haar prior on :math:`\sigma`, the Bayes factor

    .. math:: B_n(m) = r^{-1/2} \Big(\frac{1+t^2/\nu}{1+t^2/(\nu r)}\Big)^{n/2},
              \quad r = 1+n\tau^2,\; \nu = n-1,\; t = \sqrt n(\bar d-m)/s

    is a martingale of expectation 1 under normal differences of mean m and any variance, so by Ville's inequality
    :math:`P(\exists n: B_n \ge 1/\alpha) \le \alpha` (Lai 1976; Wang and Ramdas 2024). For the first few n the
    interval is infinite.

    Args:
        differences: Paired differences, shape (..., n) with n >= 1, in the order they came.
        level: Coverage over all n together, in (0, 1).
        effect_scale: The prior's standard deviation in units of the differences' own; above 0. It changes where the
            interval is narrowest, never its validity.

    Returns:
        The interval, shape (...).

    Examples:
        >>> low, high = anytime_interval([0.8, 1.0, 1.2, 0.9, 1.1, 1.0])[1:]
        >>> bool(t_interval([0.8, 1.0, 1.2, 0.9, 1.1, 1.0]).low > low > 0)
        True
    """
    mean, error, n = _mean_and_error(differences)
    width = _half_width(error, anytime_critical(n, level=level, effect_scale=effect_scale))
    return Interval(mean, mean - width, mean + width)


def anytime_critical(n: int, *, level: float = LEVEL, effect_scale: float = EFFECT_SCALE) -> float:
    """Return the |t| at which the mixture t test of `anytime_interval` rejects after n differences.

    Args:
        n: Number of differences, at least 1.
        level: Coverage over all n together, in (0, 1).
        effect_scale: As in `anytime_interval`.

    Returns:
        The critical value; infinite while n is too small for any rejection.
    """
    r = 1 + n * effect_scale**2
    # B_n = 1/alpha, solved for t^2: the ratio in brackets must reach k, and it can never exceed r.
    k = float((np.sqrt(r) / (1 - level)) ** (2 / n))
    return float(np.sqrt((n - 1) * (k - 1) / (1 - k / r))) if k < r else float("inf")


def power(effect: ArrayLike, n: ArrayLike, *, level: float = LEVEL) -> Array:
    r"""Return the probability that the t rule says *holds*.

    With true differences :math:`N(\text{margin} + \text{effect}\cdot\sigma, \sigma^2)` the lower end of the interval
    reaches the margin when a noncentral t variable with n-1 degrees of freedom and noncentrality
    :math:`\text{effect}\sqrt n` reaches the critical value.

    Args:
        effect: Distance of the true mean difference from the margin, in standard deviations of the difference.
        n: Number of seeds, at least 2.
        level: Coverage of the interval, in (0, 1).

    Returns:
        The probability, in the shape `effect` and `n` broadcast to.

    Examples:
        >>> round(float(power(2.0, 5)), 2)
        0.91
    """
    effects, seeds = np.broadcast_arrays(np.asarray(effect, float), np.asarray(n, float))
    critical = special.stdtrit(seeds - 1, (1 + level) / 2)
    # The upper tail as the lower tail of the mirrored variable: 1 - nctdtr would cancel where the power is small.
    return np.asarray(special.nctdtr(seeds - 1, -effects * np.sqrt(seeds), -critical), float)


def _half_width(error: Array, critical: float) -> Array:
    # 0 * inf: equal differences before the first n at which anything may be rejected.
    return error * critical if np.isfinite(critical) else np.full_like(error, np.inf)


def _mean_and_error(differences: ArrayLike) -> tuple[Array, Array, int]:
    values = np.asarray(differences, float)
    n = values.shape[-1]
    # Shifted by the first value, so that equal differences give their value and no rounding error beside it.
    shifted = values - values[..., :1]
    mean = shifted.mean(-1)
    error = np.sqrt(((shifted - mean[..., None]) ** 2).sum(-1) / max(n - 1, 1) / n)
    return values[..., 0] + mean, error, n
