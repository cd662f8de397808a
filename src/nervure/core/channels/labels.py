"""Labels of indices: which index of which dimension must be cut together with which.

Every index of every dimension carries an integer label; label 0 is never cut. Three kinds of facts are collected while
a network is traced and solved together afterwards: two labels are one (an addition), a label is cut when either of two
others is (heads x features flattened to one dimension), a label is never cut (an output).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Array = NDArray[np.int64]
KEPT = 0
_DEPTH = 24  # reshapes nested deeper than this are kept whole


def kept(count: int) -> Array:
    """Return the labels of a dimension that is never cut.

    Args:
        count: Its length.

    Returns:
        Zeros.
    """
    return np.zeros(count, np.int64)


@dataclass(frozen=True)
class Event:
    """Hold something that was seen to happen to labels.

    Args:
        labels: The labels.
        why: What happened.
    """

    labels: Array
    why: str


@dataclass
class Labels:
    """Collect facts about labels.

    Args:
        count: Number of labels handed out so far.
    """

    count: int = 1
    pins: list[Event] = field(default_factory=list)
    _equal: list[tuple[Array, Array]] = field(default_factory=list)
    _either: list[tuple[Array, Array, Array]] = field(default_factory=list)
    _made: dict[tuple[int, int, int], tuple[Array, Array, Array]] = field(default_factory=dict)

    def fresh(self, count: int) -> Array:
        """Hand out new labels; a dimension of length 1 cannot be cut and gets none.

        Args:
            count: How many.

        Returns:
            The labels.
        """
        if count <= 1:
            return kept(count)
        self.count += count
        return np.arange(self.count - count, self.count)

    def unite(self, left: Array, right: Array) -> None:
        """State that the labels are equal in pairs.

        Args:
            left: Labels.
            right: As many labels.
        """
        if left is not right and left.size:
            self._equal.append((left, right))

    def pin(self, labels: Array, why: str) -> None:
        """State that labels are never cut.

        Args:
            labels: The labels.
            why: The reason, for the user.
        """
        if labels.any():
            self.pins.append(Event(labels, why))

    def merge(self, outer: Array, inner: Array) -> Array:
        """Return the labels of two dimensions flattened to one: cut where either is.

        Args:
            outer: Labels of the slow dimension.
            inner: Labels of the fast one.

        Returns:
            As many labels as the product of both lengths.
        """
        if not outer.any():
            return np.tile(inner, len(outer))
        if not inner.any():
            return np.repeat(outer, len(inner))
        both = self.fresh(len(outer) * len(inner))
        self._define(both, outer, inner)
        return both

    def split(self, labels: Array, outer: int, inner: int) -> tuple[Array, Array]:
        """Return the labels of a dimension reshaped to two.

        What is cut must then be whole rows or whole columns.

        Args:
            labels: The labels, outer * inner of them.
            outer: Length of the slow dimension.
            inner: Length of the fast one.

        Returns:
            The labels of both.
        """
        if outer == 1:
            return kept(1), labels
        if inner == 1:
            return labels, kept(1)
        table = labels.reshape(outer, inner)
        if (table == table[:, :1]).all():
            return table[:, 0], kept(inner)
        if (table == table[:1]).all():
            return kept(outer), table[0]
        key = (int(labels[0]), int(labels[-1]), inner)
        known = self._made.get(key)
        if known is not None and np.array_equal(known[0], labels):
            return known[1], known[2]
        parts = self.fresh(outer), self.fresh(inner)
        self._define(labels, *parts)
        return parts

    def slow_part(self, labels: Array, part: Array) -> Array | None:
        """Tell whether a dimension was reshaped so that its slow part is another.

        Args:
            labels: Labels of the dimension.
            part: Labels of the part.

        Returns:
            Labels of the fast part, or None if it was not.
        """
        known = self._made.get((int(labels[0]), int(labels[-1]), len(labels) // max(1, len(part))))
        if known is not None and np.array_equal(known[0], labels) and np.array_equal(known[1], part):
            return known[2]
        return None

    def _define(self, labels: Array, outer: Array, inner: Array) -> None:
        self._made[int(labels[0]), int(labels[-1]), len(inner)] = (labels, outer, inner)
        self._either.append((labels, np.repeat(outer, len(inner)), np.tile(inner, len(outer))))

    def related(self, *, composed: bool) -> Array:
        """Return a component number for every label, whatever is pinned.

        Args:
            composed: Whether a composed label counts as related to its parts, rather than to its equals alone.

        Returns:
            One number a label; label 0 is related to nothing.
        """
        pairs: list[tuple[Array, Array]] = list(self._equal)
        if composed:
            pairs += [(whole, part) for whole, *parts in self._either for part in parts]
        left, right = _columns(pairs, 2)
        real = (left != KEPT) & (right != KEPT)
        return _components(self.count, left[real], right[real])

    def solve(self) -> Solution:
        """Find the smallest sets of labels that go together.

        Returns:
            The solution.
        """
        left, right = _columns(self._equal, 2)
        pinned = np.concatenate([kept(1), *(event.labels for event in self.pins)])
        left, right = np.concatenate([left, pinned]), np.concatenate([right, np.zeros_like(pinned)])
        either = _columns(self._either, 3)
        root = _components(self.count, left, right)
        while True:
            root, a, b = _closed(root, either)
            cyclic = _endless(a, b)
            if not len(cyclic):
                return Solution(root, a, b)
            stuck = np.flatnonzero(np.isin(root, cyclic))
            root = _join(root, stuck, np.zeros_like(stuck))


@dataclass(frozen=True)
class Solution:
    """Hold what labels mean: a root each, and for composed roots the two roots that either cuts.

    Args:
        root: Label -> root; the root of label 0 is never cut.
        outer: Root -> first of the two, -1 for a root that is no composition.
        inner: Root -> second of the two.
    """

    root: Array
    outer: Array
    inner: Array

    def atoms(self, labels: Array) -> Array:
        """Resolve labels to the roots that cut them.

        Args:
            labels: Any labels.

        Returns:
            Shape (layers, len(labels)): an index is cut when any entry of its column is; 0 stands for never.
        """
        never = self.root[KEPT]
        pending: list[Array] = [self.root[labels]]
        layers: list[Array] = []
        while pending:
            layer = pending.pop()
            composed = self.outer[layer] >= 0
            if composed.any():
                pending += [
                    np.where(composed, self.inner[layer], never),
                    np.where(composed, self.outer[layer], layer),
                ]
            elif (layer != never).any() or not layers:
                layers.append(np.where(layer == never, -1, layer) + 1)
        return np.stack(layers)


def _columns(rows: Sequence[tuple[Array, ...]], width: int) -> list[Array]:
    return [np.concatenate([kept(0), *(row[column] for row in rows)]) for column in range(width)]


def _components(count: int, left: Array, right: Array) -> Array:
    edges = coo_array((np.ones(len(left), np.int8), (left, right)), (count, count))
    return connected_components(edges, directed=False)[1].astype(np.int64)


def _join(root: Array, left: Array, right: Array) -> Array:
    """Unite components of labels."""
    count = int(root.max()) + 1
    return _components(count, root[left], root[right])[root]


def _closed(root: Array, either: list[Array]) -> tuple[Array, Array, Array]:
    """Unite what the compositions force to be one, until nothing changes."""
    while True:
        count, never = int(root.max()) + 1, root[KEPT]
        whole, a, b = np.unique(np.stack([root[column] for column in either], 1), axis=0).T
        forced = [
            (a[whole == never], whole[whole == never]),
            (b[whole == never], whole[whole == never]),
            (whole[a == never], b[a == never]),
            (whole[b == never], a[b == never]),
            (whole[a == b], a[a == b]),
        ]
        joined = _components(count, *_columns(forced, 2))
        if joined.max() + 1 < count:
            root = joined[root]
            continue
        real = (a != never) & (b != never) & (a != b)
        whole, a, b = whole[real], a[real], b[real]
        same = np.flatnonzero(whole[1:] == whole[:-1])
        # More than is forced, but enough: a part that is the whole leaves the other part uncut, and a label composed
        # twice is composed of the same parts.
        enough = [
            (b[whole == a], np.full_like(b[whole == a], never)),
            (a[whole == b], np.full_like(a[whole == b], never)),
            (a[same], a[same + 1]),
            (b[same], b[same + 1]),
        ]
        joined = _components(count, *_columns(enough, 2))
        if joined.max() + 1 == count:
            outer, inner = np.full(count, -1), np.full(count, -1)
            outer[whole], inner[whole] = a, b
            return root, outer, inner
        root = joined[root]


def _endless(outer: Array, inner: Array) -> Array:
    """Return composed roots whose parts never end, because a part is composed of the whole."""
    alive = np.flatnonzero(outer >= 0)
    composed = np.zeros(len(outer), bool)
    composed[alive] = True
    for _ in range(_DEPTH):
        still = composed[alive] & (composed[outer[alive]] | composed[inner[alive]])
        if not still.any():
            return kept(0)
        composed[:] = False
        composed[alive[still]] = True
    return np.flatnonzero(composed)
