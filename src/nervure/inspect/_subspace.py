"""Random projections from few coordinates to all parameters, without a stored matrix where it would be large."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from nervure._kit import UsageError
from nervure.core import rng

Kind = Literal["fastfood", "dense", "sparse", "axes"]
_BLOCK = 64  # columns drawn from one generator: the first columns are the same whatever their number


class Projection:
    """Map d coordinates to D parameters by a matrix P of columns of norm one (Fastfood: in the mean).

    Projections of one seed and kind are nested: that on d coordinates is the first d columns of any larger one.

    Args:
        size: Number of parameters D.
        dimension: Number of coordinates d, between 1 and D.
        kind: "dense" draws normal columns; "sparse" about sqrt(D) signs a column, one in each of as many stretches of
            equal length; "axes" takes d parameters themselves; "fastfood" is H G Pi H B of a Hadamard matrix H, normal
            numbers G, a permutation Pi and signs B, in O(D log D) time and O(D) memory.
        seed: Draws P.
        device: Where it works.
        dtype: In what precision.
        memory: Bytes up to which a dense matrix is stored; above, it is drawn again at each use.

    Raises:
        UsageError: If there are no such coordinates.
    """

    def __init__(
        self,
        size: int,
        dimension: int,
        *,
        kind: Kind = "fastfood",
        seed: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        memory: int = 2**27,
    ) -> None:
        if not 1 <= dimension <= size or kind not in ("fastfood", "dense", "sparse", "axes"):
            raise UsageError("no such subspace", expected=f"1 to {size} dimensions", found=f"{dimension}, {kind}")
        self.size, self.dimension, self.kind, self.seed = size, dimension, kind, seed
        self.device, self.dtype = device or torch.device("cpu"), dtype
        starts = range(0, dimension, _BLOCK)
        if kind == "fastfood":
            draw, self.padded = self._draw(0), 1 << (size - 1).bit_length()
            self.signs = self._sign(self.padded, draw)
            self.order = torch.randperm(self.padded, generator=draw).to(self.device)
            scales = torch.randn(self.padded, generator=draw, dtype=torch.float64)
            self.scales = (scales / scales.norm() / size**0.5).to(self.device, dtype)
        elif kind == "dense":
            stored = size * dimension * torch.finfo(dtype).bits // 8 <= memory
            self.columns = [self._normal(start) for start in starts] if stored else []
        elif kind == "axes":
            self.index = torch.randperm(size, generator=self._draw(0))[:dimension, None].to(self.device)
            self.values = torch.ones(dimension, 1, dtype=dtype, device=self.device)
        else:
            each = [self._sparse(start) for start in starts]
            self.index, self.values = (torch.cat(parts)[:dimension] for parts in zip(*each, strict=True))

    def apply(self, z: Tensor) -> Tensor:
        """Return P z.

        Args:
            z: Coordinates, shape (d,).

        Returns:
            Shape (D,).
        """
        if self.kind == "fastfood":
            wide = torch.zeros(self.padded, dtype=self.dtype, device=self.device)
            wide[: self.dimension] = z * self.signs[: self.dimension]
            return hadamard(self.scales * hadamard(wide)[self.order])[: self.size]
        whole = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        if self.kind == "dense":
            for start in range(0, self.dimension, _BLOCK):
                whole += z[start : start + _BLOCK] @ self._rows(start)
            return whole
        return whole.index_add_(0, self.index.flatten(), (z[:, None] * self.values).flatten())

    def pull(self, gradient: Tensor) -> Tensor:
        """Return P' g, the gradient with respect to the coordinates.

        Args:
            gradient: With respect to all parameters, shape (D,).

        Returns:
            Shape (d,).
        """
        if self.kind == "fastfood":
            wide = torch.zeros(self.padded, dtype=self.dtype, device=self.device)
            wide[: self.size] = gradient
            back = torch.zeros_like(wide)
            back[self.order] = self.scales * hadamard(wide)
            return hadamard(back)[: self.dimension] * self.signs[: self.dimension]
        if self.kind == "dense":
            return torch.cat([self._rows(start) @ gradient for start in range(0, self.dimension, _BLOCK)])
        return (gradient[self.index] * self.values).sum(1)

    def _draw(self, start: int) -> torch.Generator:
        return rng.generator("subspace", self.kind, self.seed, start)

    def _sign(self, shape: int | tuple[int, ...], draw: torch.Generator) -> Tensor:
        shape = shape if isinstance(shape, tuple) else (shape,)
        return (2 * torch.randint(2, shape, generator=draw) - 1).to(self.device, self.dtype)

    def _rows(self, start: int) -> Tensor:
        """Return columns of P, as rows."""
        return self.columns[start // _BLOCK] if self.columns else self._normal(start)

    def _normal(self, start: int) -> Tensor:
        drawn = torch.randn(_BLOCK, self.size, generator=self._draw(start))[: self.dimension - start]
        rows = drawn.to(self.device, self.dtype)
        return rows / rows.norm(dim=1, keepdim=True)

    def _sparse(self, start: int) -> tuple[Tensor, Tensor]:
        draw, count = self._draw(start), round(self.size**0.5)
        edges = torch.arange(count + 1) * self.size // count
        inside = torch.rand(_BLOCK, count, generator=draw, dtype=torch.float64)
        index = edges[:-1] + (inside * edges.diff()).long()
        return index.to(self.device), self._sign((_BLOCK, count), draw) / count**0.5


def hadamard(x: Tensor) -> Tensor:
    """Return H x for the matrix H of Walsh and Hadamard, of entries 1 and -1, in O(n log n) time.

    Args:
        x: Shape (n,), n a power of two.

    Returns:
        Shape (n,).

    Examples:
        >>> hadamard(torch.tensor([1.0, 2.0]))
        tensor([ 3., -1.])
    """
    bits = len(x).bit_length() - 1
    # H of 2^(a + b) is the Kronecker product of those of 2^a and 2^b: products with small matrices.
    parts = -(-bits // 7) or 1
    widths = [bits // parts + (place < bits % parts) for place in range(parts)]
    x = x.reshape([2**width for width in widths])
    for axis, width in enumerate(widths):
        small = _matrix(width).to(x)
        x = torch.tensordot(x, small, dims=([axis], [0])).movedim(-1, axis)
    return x.reshape(-1)


@functools.lru_cache(maxsize=16)
def _matrix(bits: int) -> Tensor:
    matrix = torch.ones(1, 1)
    for _ in range(bits):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
