"""Priors of hyper-parameters: how they are drawn and how they are perturbed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nervure._kit import UsageError


@dataclass(frozen=True)
class Range:
    """Describe a number that is drawn uniformly, or log-uniformly, and perturbed by a factor.

    Args:
        low: Smallest value drawn.
        high: Largest value drawn.
        log: Draw the logarithm uniformly.
        limits: What perturbed values are clipped to: where the number makes sense, not where it is drawn.

    Raises:
        UsageError: If the range is empty or a logarithm has no lower bound.
    """

    low: float
    high: float
    log: bool = False
    limits: tuple[float, float] = (-math.inf, math.inf)

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise UsageError("the range is empty", expected="low < high, and low > 0 with log", found=self)

    def sample(self, draw: np.random.Generator) -> float:
        """Draw a value.

        Args:
            draw: The generator.

        Returns:
            The value.
        """
        if self.log:
            return math.exp(draw.uniform(math.log(self.low), math.log(self.high)))
        return float(draw.uniform(self.low, self.high))

    def perturb(self, value: float, draw: np.random.Generator, factors: Sequence[float]) -> float:
        """Multiply by one of the factors.

        Args:
            value: The value.
            draw: The generator.
            factors: The factors, each as likely as the others.

        Returns:
            The new value.
        """
        return min(max(value * factors[int(draw.integers(len(factors)))], self.limits[0]), self.limits[1])


@dataclass(frozen=True)
class Shift(Range):
    """Describe a number that is perturbed by adding Gaussian noise, for values that may be 0.

    Args:
        low: Smallest value drawn.
        high: Largest value drawn.
        log: Draw the logarithm uniformly.
        limits: What perturbed values are clipped to.
        scale: Standard deviation of the noise.
    """

    scale: float = 0.1

    def perturb(self, value: float, draw: np.random.Generator, factors: Sequence[float]) -> float:
        """Add Gaussian noise.

        Args:
            value: The value.
            draw: The generator.
            factors: Not used.

        Returns:
            The new value.
        """
        return min(max(value + self.scale * draw.standard_normal(), self.limits[0]), self.limits[1])


@dataclass(frozen=True)
class Choice:
    """Describe one of several ordered values, perturbed by a move to a neighbour.

    Args:
        values: The values, in order.

    Raises:
        UsageError: If there is no value.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise UsageError("a choice needs values")

    def sample(self, draw: np.random.Generator) -> float:
        """Draw a value.

        Args:
            draw: The generator.

        Returns:
            The value.
        """
        return self.values[int(draw.integers(len(self.values)))]

    def perturb(self, value: float, draw: np.random.Generator, factors: Sequence[float]) -> float:
        """Move to the value before or after; at an end, a move outwards stays.

        Args:
            value: The value.
            draw: The generator.
            factors: Not used.

        Returns:
            The new value.
        """
        place = self.values.index(value) + (-1, 1)[int(draw.integers(2))]
        return self.values[min(max(place, 0), len(self.values) - 1)]


Prior = Range | Choice
