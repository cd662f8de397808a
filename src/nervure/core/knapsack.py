"""The 0/1 knapsack: which items are worth most within a capacity."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nervure._kit import UsageError

CELLS = 5e7
"""Size of the table up to which solutions are exact: items times capacity in units of the weights' common divisor."""


class Knapsack:
    """Hold the choices of greatest total value for every capacity up to one.

    best[c] = max(best[c], best[c - w] + v) item by item, over capacities in units of the weights' greatest common
    divisor. Where items times capacity exceed `CELLS`, weights are rounded up to a coarser unit: choices still keep
    within the capacity, and are optimal for the rounded weights.

    Args:
        values: Shape (n,), at least 0.
        weights: Shape (n,), whole numbers, at least 0.
        capacity: The greatest total weight.

    Raises:
        UsageError: If a number is out of range.

    Examples:
        >>> Knapsack([3, 4, 5], [2, 3, 4], 5).chosen(5).tolist()
        [True, True, False]
    """

    def __init__(self, values: ArrayLike, weights: ArrayLike, capacity: int) -> None:
        worth, heavy = _checked(values, weights, capacity)
        self.free = heavy == 0
        self.items = np.flatnonzero((heavy > 0) & (heavy <= capacity) & (worth > 0))
        heavy = heavy[self.items]
        capacity = min(int(capacity), int(heavy.sum()))
        self.unit = int(np.gcd.reduce(heavy)) if len(heavy) else 1
        self.unit *= max(1, math.ceil(len(heavy) * (capacity // self.unit + 1) / CELLS))
        self.size, self.steps = capacity // self.unit, -(-heavy // self.unit)
        best = np.zeros(self.size + 1)
        self.taken = np.zeros((len(heavy), self.size // 8 + 1), np.uint8)
        for row, (value, step) in enumerate(zip(worth[self.items], self.steps, strict=True)):
            tried = best[: max(0, self.size + 1 - step)] + value
            better = np.zeros(self.size + 1, bool)
            np.greater(tried, best[step:], out=better[step:])
            np.maximum(best[step:], tried, out=best[step:])
            self.taken[row] = np.packbits(better)

    def chosen(self, capacity: int) -> NDArray[np.bool_]:
        """Return the best choice.

        Args:
            capacity: The greatest total weight, at most that of the table.

        Returns:
            Shape (n,), flags.
        """
        flags = self.free.copy()
        place = min(capacity // self.unit, self.size)
        for row in range(len(self.items) - 1, -1, -1):
            if self.taken[row, place // 8] >> (7 - place % 8) & 1:
                flags[self.items[row]] = True
                place -= int(self.steps[row])
        return flags


def knapsack(values: ArrayLike, weights: ArrayLike, capacity: int) -> NDArray[np.bool_]:
    """Choose the items of greatest total value whose total weight is at most the capacity; see `Knapsack`.

    Args:
        values: Shape (n,), at least 0.
        weights: Shape (n,), whole numbers, at least 0.
        capacity: The greatest total weight.

    Returns:
        Shape (n,), flags of what is chosen.

    Examples:
        >>> knapsack([3, 4, 5], [2, 3, 4], 5).tolist()
        [True, True, False]
    """
    return Knapsack(values, weights, capacity).chosen(capacity)


def greedy_knapsack(values: ArrayLike, weights: ArrayLike, capacity: int) -> NDArray[np.bool_]:
    """Choose items by value per weight, skipping those that no longer fit.

    Args:
        values: As in `knapsack`.
        weights: As in `knapsack`.
        capacity: As in `knapsack`.

    Returns:
        As in `knapsack`.
    """
    worth, heavy = _checked(values, weights, capacity)
    chosen = np.zeros(len(worth), bool)
    for item in np.argsort(-worth / np.maximum(heavy, 1e-12), kind="stable"):
        if heavy[item] <= capacity:
            chosen[item] = True
            capacity -= int(heavy[item])
    return chosen


def _checked(values: ArrayLike, weights: ArrayLike, capacity: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    worth, given = np.asarray(values, float), np.asarray(weights)
    heavy = given.astype(np.int64)
    if worth.shape != heavy.shape or worth.ndim != 1 or not (heavy == given).all():
        raise UsageError("items are not values and whole weights", expected="two vectors of one length")
    if not np.isfinite(worth).all() or (worth < 0).any() or (heavy < 0).any() or capacity < 0:
        raise UsageError("values, weights and capacity are at least 0")
    return worth, heavy
