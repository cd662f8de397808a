"""Gram matrices of Jacobian rows as sums over parameters, multiplied out tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nervure._kit import UsageError
from nervure.core.forward import batch_size
from nervure.core.jacobian import Engine, Outer, Rows, expand

Outputs = Literal["full", "trace", "sum_logits", "per_class"]
TILE = 256


@dataclass
class Blocks:
    """Offer the Jacobian rows of one block of samples at a time.

    Args:
        compute: From a block's first sample to its rows.
        starts: The first samples of all blocks.
        keep: Whether rows are kept; else they are computed each time, so that one block is in memory.
    """

    compute: Callable[[int], Rows] = field(repr=False)
    starts: range
    keep: bool = True
    _kept: dict[int, Rows] = field(default_factory=dict, repr=False)

    def __call__(self, start: int) -> Rows:
        """Return the rows of the block that starts there."""
        if start in self._kept:
            return self._kept[start]
        rows = self.compute(start)
        if self.keep:
            self._kept[start] = rows
        return rows


@dataclass
class LayerwiseGram:
    """Hold an empirical NTK that is a sum over parameters.

    The parts are kept as factors and multiplied out when they are asked for.

    Args:
        outputs: Which kernel this is.
        rows: Jacobian rows of the first samples.
        columns: Those of the second; the same object where they are the same samples.
        shape: Samples in rows and columns, and outputs.
        parameters: Name -> parameter, watched for changes where rows are computed again.
    """

    outputs: Outputs
    rows: Blocks = field(repr=False)
    columns: Blocks = field(repr=False)
    shape: tuple[int, int, int]
    parameters: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    _total: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._versions = [value._version for value in self.parameters.values()]

    @property
    def full(self) -> Tensor:
        """Return the kernel.

        Its shape is (N, M, O, O) for "full", (O, N, M) for "per_class", else (N, M).
        """
        if self._total is None:
            self._total = self._sum(None)
        return self._arranged(self._total)

    def matrix(self) -> Tensor:
        """Return the kernel as one matrix: for "full" with rows (output, sample), shape (O N, O M)."""
        if self.outputs != "full":
            return self.full
        N, M, P = self.shape
        return self.full.permute(2, 0, 3, 1).reshape(P * N, P * M)

    def components(self) -> dict[str, Tensor]:
        """Return the part of every parameter, in the shape of `full`; they sum to it.

        Raises:
            UsageError: If rows must be computed again and the model has changed since.
        """
        if not self.rows.keep and self._versions != [value._version for value in self.parameters.values()]:
            raise UsageError("the model has changed since its kernel was computed", try_="compute the kernel again")
        return {name: self._arranged(self._sum(name)) for name in self.parameters}

    def _arranged(self, stored: Tensor) -> Tensor:
        if self.outputs == "full":
            return stored.permute(1, 3, 0, 2)
        if self.outputs == "trace":
            return stored.sum(0)
        return stored[0] if self.outputs == "sum_logits" else stored

    def _sum(self, name: str | None) -> Tensor:
        N, M, P = self.shape
        whole = self.outputs == "full"
        symmetric = self.rows is self.columns
        total: Tensor | None = None
        for i in self.rows.starts:
            rows = self.rows(i)
            if total is None:
                total = first_tensor(rows).new_empty((P, N, P, M) if whole else (P, N, M))
            for j in self.columns.starts:
                if symmetric and j > i:
                    break
                same = symmetric and i == j
                pair = (rows, rows) if same else _alike(rows, self.columns(j))
                left = _Factors(pair[0], name)
                right = left if same else _Factors(pair[1], name)
                n, m = slice(i, i + left.samples), slice(j, j + right.samples)
                for o, p in _output_tiles(P, left.samples, full=whole, symmetric=same):
                    block = left.block(o, right, p)
                    if not whole:
                        total[o.start, n, m] = block[0, :, 0]
                        if symmetric and not same:
                            total[o.start, m, n] = block[0, :, 0].T
                        continue
                    total[o, n, p, m] = block
                    if symmetric and (not same or o != p):
                        total[p, m, o, n] = block.permute(2, 3, 0, 1)
        assert total is not None
        return total


def units(output: Tensor) -> Tensor:
    """Return the cotangents that pick single outputs.

    Args:
        output: Outputs of N samples, O numbers each, shape (N, ...).

    Returns:
        Shape (O, N, ...).
    """
    count = output[0].numel()
    unit = torch.eye(count, dtype=output.dtype, device=output.device)
    return unit[:, None].expand(count, len(output), count).reshape(count, *output.shape)


def tangent_kernel(model: nn.Module, inputs: Any, others: Any = None) -> Tensor:
    """Return the empirical tangent kernel summed over outputs, K[n, m] = sum_o (df_o(x_n)/dw) (df_o(x_m)/dw).

    Args:
        model: The model, in the mode it is in; batch normalisation must be in eval mode.
        inputs: Inputs of N samples.
        others: Inputs of M samples; None takes `inputs`.

    Returns:
        Shape (N, M).
    """
    engine = Engine(model, inputs, method="tangent_kernel")

    def blocks(each: Any) -> Blocks:
        def compute(start: int) -> Rows:
            with engine.trace(each) as trace:
                return trace.rows(units(trace.output.detach()))

        return Blocks(compute, range(0, batch_size(each), batch_size(each)))

    rows = blocks(inputs)
    columns = rows if others is None else blocks(others)
    shape = (batch_size(inputs), batch_size(inputs if others is None else others), engine.outputs)
    return LayerwiseGram("trace", rows, columns, shape, engine.chosen).full.detach()


def gram_of(rows: Rows) -> Tensor:
    """Return the Gram matrix of Jacobian rows.

    Args:
        rows: O cotangents of N samples.

    Returns:
        Shape (N, N, O, O).
    """
    count, samples = first_tensor(rows).shape[:2]
    blocks = Blocks(lambda _: rows, range(1))
    return LayerwiseGram("full", blocks, blocks, (samples, samples, count)).full


class _Factors:
    """Offer blocks of a Gram matrix from rows: one GEMM for explicit rows, (A A') * (G G') for linear layers."""

    def __init__(self, rows: Rows, name: str | None) -> None:
        explicit = [value for key, value in sorted(rows.explicit.items()) if name in (None, key)]
        outers = sorted(rows.outers, key=_names_of)
        if name is not None:
            outers = [
                Outer(name if name == x.weight else None, name if name == x.bias else None, x.a, x.g)
                for x in outers
                if name in (x.weight, x.bias)
            ]
        self.outers = outers
        first = first_tensor(rows)
        self.samples = first.shape[1]
        flat = [value.flatten(2) for value in explicit]
        # One matrix of all explicit rows is one GEMM a tile; a single large one is not copied.
        self.flat = None if not flat else flat[0] if len(flat) == 1 else torch.cat(flat, 2)
        self._inside: dict[int, list[Tensor]] = {}

    def block(self, o: slice, other: _Factors, p: slice) -> Tensor:
        """Return the Gram block of outputs `o` of these rows and `p` of the others, shape (o, N, p, M)."""
        count, number = o.stop - o.start, p.stop - p.start
        N, M = self.samples, other.samples
        total: Tensor | None = None
        if self.flat is not None and other.flat is not None:
            total = self.flat[o].flatten(0, 1) @ other.flat[p].flatten(0, 1).T
        for outer, last, inside in zip(self.outers, other.outers, self._insides(other), strict=True):
            gram = outer.g[o].flatten(0, 1) @ last.g[p].flatten(0, 1).T
            if total is None:
                total = torch.zeros_like(gram)
            shape = (count, N, number, M)
            total.view(shape).addcmul_(gram.view(shape), inside[None, :, None, :])
        assert total is not None
        return total.view(count, N, number, M)

    def _insides(self, other: _Factors) -> list[Tensor]:
        if id(other) not in self._inside:
            self._inside[id(other)] = [x.inside(y) for x, y in zip(self.outers, other.outers, strict=True)]
        return self._inside[id(other)]


def first_tensor(rows: Rows) -> Tensor:
    """Return any tensor of some rows, whose first axes are (O, N).

    Args:
        rows: The rows.

    Returns:
        The tensor.
    """
    return next(iter(rows.explicit.values())) if rows.explicit else rows.outers[0].g


def _output_tiles(count: int, samples: int, *, full: bool, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    if not full:
        yield from ((slice(o, o + 1), slice(o, o + 1)) for o in range(count))
        return
    width = max(1, TILE // samples)
    tiles = [slice(o, min(count, o + width)) for o in range(0, count, width)]
    for i, o in enumerate(tiles):
        yield from ((o, p) for p in (tiles[: i + 1] if symmetric else tiles))


def _names_of(outer: Outer) -> tuple[str, str]:
    return outer.weight or "", outer.bias or ""


def _alike(rows: Rows, columns: Rows) -> tuple[Rows, Rows]:
    """Return both in full where a parameter is a factor in one and explicit in the other."""
    if rows.explicit.keys() == columns.explicit.keys():
        return rows, columns
    return Rows(expand(rows)), Rows(expand(columns))
