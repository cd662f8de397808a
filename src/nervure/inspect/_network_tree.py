"""Grow the decision tree of a network on a box: polytopes cut corner by corner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nervure._kit import BadData, Unsupported
from nervure.inspect._affine_pieces import Pieces, deviation, run

Array = NDArray[np.float64]
Split = tuple[Array, float, list[int]]
_METHOD = "decision_tree"


@dataclass(frozen=True)
class Cell:
    """Hold a polytope with an interior by its corners.

    Args:
        corners: Shape (V, D).
        tight: Which of the faces met so far each corner lies on, ones and zeros, shape (V, F).
        thin: Distance below which a point counts as lying on a face.
        place: The split and side the cell hangs on; None for the root.
    """

    corners: Array
    tight: Array
    thin: float
    place: tuple[int, int] | None = None

    @classmethod
    def box(cls, low: Array, high: Array) -> Cell:
        """Return a box."""
        side = np.indices((2,) * len(low)).reshape(len(low), -1).T
        return cls(
            np.where(side, high, low), np.hstack([side, 1 - side]).astype(float), 1e-9 * float((high - low).min())
        )

    def sides(self, margin: Array, split: int) -> tuple[Cell, Cell]:
        """Cut the cell where the margin of its corners changes sign; some must lie on either side.

        Args:
            margin: Signed distance of each corner from the cut, shape (V,).
            split: The number of the split, on which the parts hang.

        Returns:
            Where the margin is negative, and where it is positive.
        """
        over, under = margin > self.thin, margin < -self.thin
        size = self.corners.shape[1]
        # The ends of an edge share all faces but one of those that make a corner.
        first, second = np.nonzero(self.tight[over] @ self.tight[under].T >= size - 1)
        one, two = np.nonzero(over)[0][first], np.nonzero(under)[0][second]
        shared = self.tight[one] * self.tight[two]
        if (self.tight.sum(1) > size).any():
            # Where more faces meet, the ends of an edge are the only two corners on what they share.
            edge = (shared @ self.tight.T == shared.sum(1, keepdims=True)).sum(1) == 2
            one, two, shared = one[edge], two[edge], shared[edge]
        share = (margin[one] / (margin[one] - margin[two]))[:, None]
        born = self.corners[one] + share * (self.corners[two] - self.corners[one])
        on = np.hstack([self.tight, (~over & ~under)[:, None]])
        born_on = np.hstack([shared, np.ones((len(shared), 1))])
        low, high = (
            Cell(
                np.concatenate([self.corners[kept], born]),
                np.concatenate([on[kept], born_on]),
                self.thin,
                (split, side),
            )
            for side, kept in enumerate((~over, ~under))
        )
        return low, high


def parts(
    cell: Cell, weight: Array, start: Array, breaks: Sequence[float], splits: list[Split]
) -> list[tuple[Cell, NDArray[np.int64]]]:
    """Split a cell by the units z = weight t + start of one layer that change their piece inside it.

    Args:
        cell: The cell, on which the units are affine.
        weight: Shape (U, D).
        start: Shape (U,).
        breaks: Where each unit changes its piece.
        splits: All splits of the tree; new ones are added.

    Returns:
        The parts, and the pieces the units are on, shape (U,).
    """
    norms = np.linalg.norm(weight, axis=1)
    norms = np.where(norms <= 1e-12 * np.maximum(1.0, np.abs(start)), 1.0, norms)
    done: list[tuple[Cell, NDArray[np.int64]]] = []
    stack: list[tuple[Cell, int, NDArray[np.int64]]] = [(cell, 0, np.zeros(len(start), dtype=np.int64))]
    while stack:
        here, unit, piece = stack.pop()
        while unit < len(start):
            if piece[unit] == len(breaks):
                unit += 1
                continue
            rule = weight[unit] / norms[unit]
            threshold = float((breaks[piece[unit]] - start[unit]) / norms[unit])
            margin = here.corners @ rule - threshold
            if margin.max() <= here.thin:
                unit += 1
            elif margin.min() >= -here.thin:
                piece[unit] += 1
            else:
                if here.place is not None:
                    splits[here.place[0]][2][here.place[1]] = len(splits)
                here, above = here.sides(margin, len(splits))
                splits.append((rule, threshold, [0, 0]))
                raised = piece.copy()
                raised[unit] += 1
                stack.append((above, unit, raised))
                unit += 1
        done.append((here, piece))
    return done


@dataclass(frozen=True)
class NetworkTree:
    """Hold the decision tree a network is on a box: split n asks whether rules[n] t > thresholds[n].

    Args:
        low: Lower corner of the box, shape (D,).
        high: Upper corner.
        rules: Rows of length 1, shape (S, D).
        thresholds: Shape (S,).
        children: Where no and yes lead, shape (S, 2): to a split, or for -1 - n to leaf n.
        weight: The leaves' linear maps, shape (L, O, D).
        bias: Their outputs at t = 0, shape (L, O).
        corners: Of all leaves, one leaf after the other, shape (C, D).
        owners: The leaf of each corner, shape (C,).
        error: Largest deviation from the network at the leaves' points.
    """

    low: Tensor
    high: Tensor
    rules: Tensor
    thresholds: Tensor
    children: Tensor
    weight: Tensor
    bias: Tensor
    corners: Tensor
    owners: Tensor
    error: float

    @property
    def points(self) -> Tensor:
        """A point inside each leaf, the mean of its corners, shape (L, D)."""
        sums = torch.zeros(self.leaves, len(self.low)).to(self.low).index_add_(0, self.owners, self.corners)
        return sums / self.owners.bincount(minlength=self.leaves)[:, None]

    @property
    def leaves(self) -> int:
        """Number of leaves: of the patterns of pieces that have an interior."""
        return len(self.weight)

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return each point's leaf and how many splits led there.

        Args:
            t: Points, shape (N, ...).

        Returns:
            Two of shape (N,).

        Raises:
            BadData: If a point lies outside the box, where the tree does not hold.
        """
        t = t.flatten(1).to(self.low)
        if not bool(((t >= self.low) & (t <= self.high)).all()):
            raise BadData("a point lies outside the tree's box", try_="a tree of a larger box")
        place = torch.full((len(t),), 0 if len(self.rules) else -1, device=t.device)
        depth = torch.zeros_like(place)
        while bool((inner := place >= 0).any()):
            at = place[inner]
            yes = ((t[inner] * self.rules[at]).sum(1) > self.thresholds[at]).long()
            place[inner] = self.children[at, yes]
            depth += inner
        return -1 - place, depth

    def __call__(self, t: Tensor) -> Tensor:
        """Return the outputs at points of the box, shape (N, O)."""
        leaf, _ = self.path(t)
        return torch.einsum("nod,nd->no", self.weight[leaf], t.flatten(1).to(self.low)) + self.bias[leaf]

    def operations(self, t: Tensor) -> float:
        """Return the mean multiply-adds and comparisons of the points' paths."""
        outs, size = self.weight.shape[1:]
        return float(self.path(t)[1].double().mean()) * (size + 1) + outs * size

    def maximum(self, weights: Tensor) -> tuple[float, Tensor]:
        """Return the exact largest value of a weighted sum of the outputs on the box, and where it is.

        Args:
            weights: Shape (O,).

        Returns:
            The value and the point, shape (D,).
        """
        scores = weights.to(self.low)
        slopes, starts = scores @ self.weight, self.bias @ scores
        found = (slopes[self.owners] * self.corners).sum(1) + starts[self.owners]
        best = int(found.argmax())
        return float(found[best]), self.corners[best]


class _Grown:
    """Hold the known units of many cells on their pieces and stop at the first that are not known."""

    class Stop(Exception):
        """Leave the model's forward with the values of the units that were met."""

        def __init__(self, z: Tensor, pieces: Pieces) -> None:
            self.z, self.pieces = z, pieces

    def __init__(self, known: Sequence[Tensor]) -> None:
        self.known, self.site = known, 0

    def pieces(self, z: Tensor, pieces: Pieces) -> Tensor:
        """Return what is known."""
        if self.site == len(self.known):
            raise self.Stop(z, pieces)
        self.site += 1
        return self.known[self.site - 1]

    def largest(self, z: Tensor, valid: Tensor) -> Tensor:
        """Refuse.

        Raises:
            Unsupported: Always.
        """
        raise Unsupported(_METHOD, "the network", why="a maximum of several is no sign test", try_="affine_piece")


def grow(model: nn.Module, low: Tensor, high: Tensor, *, lay: Callable[[Tensor], Tensor], most: int) -> NetworkTree:
    """Build a tree, one layer of units after the other for all cells at once.

    Args:
        model: From `twin`.
        low: Lower corner, shape (D,).
        high: Upper corner.
        lay: From coordinates, shape (N, D), to the model's input.
        most: Most leaves.

    Returns:
        The tree.

    Raises:
        Unsupported: If there are too many leaves.
    """
    middle, half = (low + high) / 2, (high - low) / 2
    frame = lay(torch.cat([middle[None], middle + torch.diag(half)]))
    cells = [Cell.box(low.cpu().numpy(), high.cpu().numpy())]
    splits: list[Split] = []
    known: list[Tensor] = []
    while True:
        chooser = _Grown(known)
        rows = frame.repeat(len(cells), *[1] * (frame.ndim - 1))
        try:
            found = run(model, rows, frames=len(cells), points=len(middle) + 1, chooser=chooser, method=_METHOD)
            break
        except _Grown.Stop as stop:
            z, pieces = stop.z, stop.pieces
        weight, start = _maps(z, middle, half)
        made: list[tuple[int, Cell, NDArray[np.int64]]] = []
        for number, cell in enumerate(cells):
            within = parts(cell, weight[number].numpy(), start[number].numpy(), pieces.breaks, splits)
            made += [(number, *one) for one in within]
            if len(made) > most:
                raise Unsupported(_METHOD, model, why=f"it has more than {most} leaves", try_="a smaller box")
        index = torch.tensor([number for number, _, _ in made], device=low.device)
        chosen = torch.from_numpy(np.stack([piece for _, _, piece in made])).to(low.device)
        known = [*(value[index] for value in known), chosen]
        cells = [cell for _, cell, _ in made]
    for number, cell in enumerate(cells):
        if cell.place is not None:
            splits[cell.place[0]][2][cell.place[1]] = -1 - number
    weight, bias = (value.to(low) for value in _maps(found, middle, half))
    tree = NetworkTree(
        low=low,
        high=high,
        rules=torch.from_numpy(np.array([rule for rule, _, _ in splits]).reshape(-1, len(low))).to(low),
        thresholds=torch.tensor([threshold for _, threshold, _ in splits]).to(low),
        children=torch.tensor([both for _, _, both in splits], dtype=torch.long, device=low.device).reshape(-1, 2),
        weight=weight,
        bias=bias,
        corners=torch.from_numpy(np.concatenate([cell.corners for cell in cells])).to(low),
        owners=torch.repeat_interleave(torch.tensor([len(cell.corners) for cell in cells], device=low.device)),
        error=0.0,
    )
    expected = torch.einsum("lod,ld->lo", weight, tree.points) + bias
    return replace(tree, error=deviation(model, lay(tree.points), expected, _METHOD))


def _maps(z: Tensor, middle: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Return linear maps, shape (frames, units, D), and values at t = 0, from values on frames of points."""
    weight = ((z[:, 1:] - z[:, :1]) / half[:, None]).transpose(1, 2)
    return weight.cpu(), (z[:, 0] - weight @ middle).cpu()
