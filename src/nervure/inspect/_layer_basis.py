"""The interaction basis of one layer: what is summed over samples, and the two eigenvalue problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nervure._kit import BadData
from nervure.core.rng import generator
from nervure.inspect._sections import METHOD, Runs, rows


@dataclass(frozen=True)
class LayerBasis:
    """Hold the interaction basis of what one layer reads; the last of its units is the constant one.

    Args:
        rotation: C, shape (units + 1, directions): coordinates are C'f.
        inverse: Its pseudo-inverse, shape (directions, units + 1).
        values: |L| of every direction, descending: how much later layers depend on it.
        active: Rank of the activations' Gram matrix, the constant unit included.
        limit: Most directions that the reading layer itself can tell apart: its outputs times the entries of a kernel.
        sure: Whether both ranks are the same on half of the samples, and no eigenvalue is within a factor ten of the
            tolerance.
        synchronised: ReLUs that fire on exactly the samples on which another one does; those that always or never
            fire are left out.
    """

    rotation: Tensor
    inverse: Tensor
    values: Tensor
    active: int
    limit: int
    sure: bool
    synchronised: int

    @property
    def units(self) -> int:
        """Number of units, without the constant one."""
        return len(self.rotation) - 1

    @property
    def directions(self) -> int:
        """Number of directions that are active and read."""
        return self.rotation.shape[1]

    @property
    def dropped(self) -> int:
        """Directions that are not active, or that nothing reads."""
        return self.units + 1 - self.directions

    @property
    def wasted(self) -> int:
        """Directions dropped although the reading layer is wide enough for them, and ReLUs that are no choice."""
        return self.units + 1 - self.active + max(0, min(self.active, self.limit) - self.directions) + self.synchronised

    def coordinates(self, activations: Tensor) -> Tensor:
        """Return activations in this basis.

        Args:
            activations: Shape (..., units).

        Returns:
            Shape (..., directions), in float64.
        """
        return activations.double() @ self.rotation[:-1] + self.rotation[-1]


@dataclass
class Moments:
    """Hold sums over the samples of the first and of the second half.

    Args:
        gram: Sums of f f', shape (2, units + 1, units + 1).
        outer: Sums of g g', over samples, positions and directions of later layers.
        count: Samples times positions, shape (2,).
        code: For each unit, the sum of a random number over the samples on which it fires.
        fired: On how many it fires.
        rectified: Whether all activations are computed, and none is negative.
        limit: Most directions that the reading layer can tell apart.
    """

    gram: Tensor
    outer: Tensor
    count: Tensor
    code: Tensor
    fired: Tensor
    rectified: bool
    limit: int

    @classmethod
    def of(cls, units: int, limit: int, device: torch.device) -> Moments:
        """Return moments of no samples."""
        size = units + 1
        gram, outer = torch.zeros(2, 2, size, size, dtype=torch.float64, device=device)
        code, fired = torch.zeros(2, units, dtype=torch.int64, device=device)
        return cls(gram, outer, torch.zeros(2).to(gram), code, fired, True, min(limit, size))

    def see(self, activations: Tensor, half: int, draw: torch.Generator, *, computed: bool) -> None:
        """Add activations.

        Args:
            activations: Shape (N, T, units).
            half: How many samples belong to the first half.
            draw: Draws a number for each sample.
            computed: Whether they were computed from parameters.
        """
        folded = torch.cat([activations, activations.new_ones(*activations.shape[:2], 1)], -1)
        for part, some in enumerate((folded[:half], folded[half:])):
            flat = some.flatten(0, 1)
            self.gram[part] += flat.T @ flat
            self.count[part] += len(flat)
        fires = activations.flatten(0, 1) > 0
        self.rectified &= computed and bool((activations >= 0).all())
        # Two units of one pattern have one sum of random numbers; two patterns do, with probability 2^-62.
        drawn = torch.randint(2**62, (len(fires), 1), generator=draw).to(fires.device)
        self.code += (drawn * fires).sum(0)
        self.fired += fires.sum(0)

    def add(self, gradients: Tensor, half: int, weight: float) -> None:
        """Add gradients of a later layer's directions.

        Args:
            gradients: Shape (K, N, T, units + 1).
            half: How many samples belong to the first half.
            weight: Weight of each of the K.
        """
        for part, some in enumerate((gradients[:, :half], gradients[:, half:])):
            flat = some.flatten(0, 2)
            self.outer[part] += weight * flat.T @ flat

    @property
    def synchronised(self) -> int:
        """Units that fire as another one does, if what is read comes from ReLUs."""
        choosing = self.code[(self.fired > 0) & (self.fired < self.count.sum())]
        return len(choosing) - len(choosing.unique()) if self.rectified else 0


def collected(runs: Runs, halves: Sequence[int], seed: int) -> tuple[list[str], list[Moments]]:
    """Return the names of the layers, and what their activations say; the last moments are those of the output.

    Args:
        runs: The runs of all batches.
        halves: How many samples of each batch belong to the first half.
        seed: Draws the numbers by which patterns of ReLUs are told apart.

    Returns:
        Names and moments.

    Raises:
        BadData: If two batches take different ways through the model.
    """
    moments: list[Moments] = []
    names: list[str] = []
    draw = generator(METHOD, seed, "patterns")
    for cuts, half in zip(runs, halves, strict=True):
        reads = cuts[0].reads
        if not moments:
            names = [read.name for read in reads[:-1]]
            moments = [Moments.of(rows(read).shape[-1], read.limit, read.leaf.device) for read in reads]
        if [read.name for read in reads[:-1]] != names:
            raise BadData("two batches take different ways through the model", found=[read.name for read in reads])
        for moment, read in zip(moments, reads, strict=True):
            moment.see(rows(read), half, draw, computed=read.computed)
    return names, moments


def solved(moment: Moments, tolerance: float) -> LayerBasis:
    """Solve the two eigenvalue problems of one layer.

    Args:
        moment: Its moments.
        tolerance: As in `interaction_rotations`.

    Returns:
        Its basis.
    """
    D, U = _eigen(moment.gram.sum(0) / moment.count.sum())
    active, first = _rank(D, _eigen(moment.gram[0] / moment.count[0])[0], tolerance)
    S, R = U[:, :active] * D[:active].sqrt(), U[:, :active] / D[:active].sqrt()
    L, V = _eigen(S.T @ moment.outer.sum(0) @ S / moment.count.sum())
    kept, second = _rank(L, _eigen(S.T @ moment.outer[0] @ S / moment.count[0])[0], tolerance)
    L, V = L[:kept], V[:, :kept]
    C, inverse = R @ V * L.sqrt(), (S @ V / L.sqrt()).T
    # The sign of an eigenvector is arbitrary: the largest entry of each is positive.
    largest = C.gather(0, C.abs().argmax(0, keepdim=True)).sign()
    return LayerBasis(C * largest, inverse * largest.T, L, active, moment.limit, first and second, moment.synchronised)


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0), vectors.flip(1)


def _rank(values: Tensor, half: Tensor, tolerance: float) -> tuple[int, bool]:
    """Return how many eigenvalues count, and whether that is sure."""
    if not len(values) or not float(values[0]) > 0:
        return 0, True
    relative = values / values[0]
    rank = int((relative > tolerance).sum())
    near = (relative > tolerance / 10) & (relative < tolerance * 10)
    same = float(half[0]) > 0 and int((half > tolerance * half[0]).sum()) == rank
    return rank, same and not bool(near.any())
