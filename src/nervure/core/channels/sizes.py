"""Whole numbers that know where they come from: ``x.shape[1] // self.heads`` in a user's forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nervure.core.channels.labels import Array, Labels, kept


@dataclass(frozen=True, eq=False)
class Leaf:
    """Hold where a number was read.

    Args:
        labels: The labels of the dimension it counts, or of the dimensions an attribute sets.
        attribute: Whether it is an attribute of a module rather than the length of a dimension.
    """

    labels: Array
    attribute: bool = False


class Size(int):
    """An integer that remembers the product and quotient it was computed by.

    Args:
        value: The number.
        over: Factors of the numerator, in order.
        under: Factors of the denominator.
        read: Called with the leaves when the number is used for anything but a size.
        opaque: Whether it was computed in a way that is not followed.
    """

    over: tuple[int | Leaf, ...]
    under: tuple[int | Leaf, ...]
    read: Callable[[Size], None]
    opaque: bool

    def __new__(
        cls,
        value: int,
        over: tuple[int | Leaf, ...],
        under: tuple[int | Leaf, ...] = (),
        *,
        read: Callable[[Size], None],
        opaque: bool = False,
    ) -> Size:
        """Make a number; an int takes its value here."""
        self = super().__new__(cls, value)
        self.over, self.under, self.read, self.opaque = over, under, read, opaque
        return self

    def leaves(self) -> list[Leaf]:
        """Return every place the number depends on."""
        return [factor for factor in (*self.over, *self.under) if isinstance(factor, Leaf)]

    def _parts(self, other: int) -> tuple[tuple[int | Leaf, ...], tuple[int | Leaf, ...], bool]:
        return (other.over, other.under, other.opaque) if isinstance(other, Size) else ((int(other),), (), False)

    def _times(self, other: Any, *, first: bool) -> Any:
        if not isinstance(other, int):
            return self._used(other, "__mul__")
        over, under, opaque = self._parts(other)
        pair = (self.over + over) if first else (over + self.over)
        return self._reduced(int(self) * int(other), pair, self.under + under, opaque or self.opaque)

    def _reduced(self, value: int, over: tuple[int | Leaf, ...], under: tuple[int | Leaf, ...], opaque: bool) -> Size:
        top, bottom = [factor for factor in over if factor != 1], []
        for factor in under:
            if factor in top:
                top.remove(factor)
            elif factor != 1:
                bottom.append(factor)
        return Size(value, tuple(top), tuple(bottom), read=self.read, opaque=opaque)

    def _used(self, other: Any, name: str) -> Any:
        self.read(self)
        return getattr(int(self), name)(other)

    def _opaque(self, value: int, other: Any) -> Size:
        over, under, _ = self._parts(other)
        return Size(value, self.over + over, self.under + under, read=self.read, opaque=True)

    def __mul__(self, other: Any) -> Any:
        return self._times(other, first=True)

    def __rmul__(self, other: Any) -> Any:
        return self._times(other, first=False)

    def _divided(self, top: int, bottom: int) -> Any:
        value = int(top) // int(bottom)
        if value * int(bottom) != int(top):
            return self._opaque(value, bottom if top is self else top)
        over, under, opaque = self._parts(top)
        over2, under2, opaque2 = self._parts(bottom)
        return self._reduced(value, over + under2, under + over2, opaque or opaque2)

    def __floordiv__(self, other: Any) -> Any:
        return self._divided(self, other) if isinstance(other, int) else self._used(other, "__floordiv__")

    def __rfloordiv__(self, other: Any) -> Any:
        return self._divided(other, self) if isinstance(other, int) else self._used(other, "__rfloordiv__")

    def __add__(self, other: Any) -> Any:
        return self._opaque(int(self) + int(other), other) if isinstance(other, int) else self._used(other, "__add__")

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._opaque(int(self) - int(other), other) if isinstance(other, int) else self._used(other, "__sub__")

    def __rsub__(self, other: Any) -> Any:
        return self._opaque(int(other) - int(self), other) if isinstance(other, int) else self._used(other, "__rsub__")

    def __neg__(self) -> Any:
        return self._opaque(-int(self), 1)

    def __float__(self) -> float:
        self.read(self)
        return float(int(self))

    def __truediv__(self, other: Any) -> Any:
        return self._used(other, "__truediv__")

    def __rtruediv__(self, other: Any) -> Any:
        return self._used(other, "__rtruediv__")

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        return self._used(other, "__pow__")

    def __rpow__(self, other: Any, modulo: Any = None) -> Any:
        return self._used(other, "__rpow__")

    def __mod__(self, other: Any) -> Any:
        # Mostly a check that something divides; not followed, the run after surgery says so if it mattered.
        return int(self) % int(other)

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int(self)

    def __reduce__(self) -> Any:
        return int, (int(self),)


def constrain(labels: Labels, dimension: Array, size: int, where: str) -> None:
    """State that a dimension's length is a number of the forward, and stays so after every cut.

    Args:
        labels: Where facts are collected.
        dimension: The labels of the dimension.
        size: The number.
        where: The place in the user's code.
    """
    if not isinstance(size, Size):
        labels.pin(dimension, f"the size {int(size)} is written down at {where}")
        return
    if size.opaque:
        for array in (dimension, *(leaf.labels for leaf in size.leaves())):
            labels.pin(array, f"a size is computed in a way that is not followed at {where}")
        return
    for factor in size.under:
        if isinstance(factor, Leaf):
            labels.pin(factor.labels, f"a size is divided by it at {where}")
    whole = kept(1)
    for factor in size.over:
        whole = labels.merge(whole, factor.labels if isinstance(factor, Leaf) else kept(factor))
    fast = labels.slow_part(whole, dimension) if size.under else None
    if fast is not None:
        labels.pin(fast, f"a size is divided by it at {where}")
        return
    labels.unite(whole, np.tile(dimension, len(whole) // max(1, len(dimension))))
