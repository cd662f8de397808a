"""Fits of L(x) = L_inf + A x^(-a), many at once: for each exponent the rest is linear."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_EXPONENTS = np.geomspace(0.01, 5.0, 80)


@dataclass(frozen=True)
class Fits:
    """Hold the best fits of B sets of losses.

    Args:
        floor: L_inf, shape (B,).
        factor: A of the scaled x / x_mid, shape (B,).
        exponent: a, shape (B,).
        error: Sum of weighted squared relative residuals, shape (B,).
    """

    floor: Array
    factor: Array
    exponent: Array
    error: Array

    def at(self, ratio: Array) -> Array:
        """Return the fitted losses at x / x_mid = ratio, shape (B, n)."""
        return self.floor[:, None] + self.factor[:, None] * ratio[None] ** -self.exponent[:, None]


def fit(ratio: Array, losses: Array, weights: Array, *, floor: bool = True) -> Fits:
    """Fit every row of losses by least squares of relative residuals, L_inf >= 0 and A >= 0.

    The exponent is searched on a grid that is then refined three times around the best.

    Args:
        ratio: x / x_mid, shape (n,).
        losses: Shape (B, n), above 0.
        weights: Of the points, shape (n,).
        floor: Whether there is an L_inf; without one it is 0.

    Returns:
        The fits.
    """
    exponents = np.broadcast_to(_EXPONENTS, (len(losses), len(_EXPONENTS)))
    step = np.log(_EXPONENTS[1] / _EXPONENTS[0])
    for _ in range(4):
        c, b, error = _linear(ratio, losses, weights, exponents, floor)
        best = error.argmin(1)[:, None]
        chosen = np.take_along_axis(exponents, best, 1)
        found = Fits(*(np.take_along_axis(each, best, 1)[:, 0] for each in (c, b, exponents, error)))
        exponents = chosen * np.exp(np.linspace(-step, step, 41))[None]
        step /= 20
    return found


def _linear(ratio: Array, losses: Array, weights: Array, exponents: Array, floor: bool) -> tuple[Array, Array, Array]:
    """Return L_inf, A and the error of every row and exponent, each of shape (B, G)."""
    u = 1 / losses[:, None]  # the relative residual is 1 - c u - b v
    v = ratio ** -exponents[:, :, None] * u
    uu, uv, vv = ((weights * each).sum(2) for each in (u * u, u * v, v * v))
    su, sv = ((weights * each).sum(2) for each in (u, v))
    only_b = sv / vv
    if not floor:
        c, b = np.zeros_like(only_b), only_b
    else:
        det = uu * vv - uv**2
        safe = np.where(det > 1e-14 * uu * vv, det, np.inf)
        c, b = (su * vv - sv * uv) / safe, (sv * uu - su * uv) / safe
        c, b = np.where(b < 0, su / uu, c), np.maximum(b, 0.0)
        b, c = np.where((c < 0) | (det <= 1e-14 * uu * vv), only_b, b), np.where(det > 1e-14 * uu * vv, c, 0.0)
        c = np.maximum(c, 0.0)
    error = (weights * (1 - c[:, :, None] * u - b[:, :, None] * v) ** 2).sum(2)
    return c, b, error


def supported(ratio: Array, losses: Array, weights: Array, limit: float) -> dict[str, tuple[float, float]]:
    """Return which L_inf and exponents have a fit whose error is at most the limit: ends of the two ranges.

    Args:
        ratio: x / x_mid, shape (n,).
        losses: Shape (n,).
        weights: Of the points, shape (n,).
        limit: The largest error.

    Returns:
        "floor" and "exponent" -> lowest and highest.
    """
    exponents, floors = np.geomspace(0.01, 5.0, 1000), np.linspace(0.0, 1.05 * losses.min(), 1000)
    u, v = 1 / losses, ratio ** -exponents[:, None] / losses
    left = 1 - floors[:, None] * u
    # For given L_inf and exponent the best factor is a ratio, at least 0.
    along, square = np.maximum((weights * left) @ v.T, 0.0), (weights * v * v).sum(1)
    held = (weights * left**2).sum(1)[:, None] - along**2 / square <= limit
    ranges = {"floor": floors[held.any(1)], "exponent": exponents[held.any(0)]}
    return {name: (float(each[0]), float(each[-1])) if len(each) else (np.nan, np.nan) for name, each in ranges.items()}
