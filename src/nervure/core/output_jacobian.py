"""The Jacobian of a model's outputs with respect to its parameters as a linear operator; it is never formed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from nervure._kit import NotDeterministic, Unsupported, UsageError
from nervure.core.graph import Graph, Multiply, Stage
from nervure.core.vectors import unflatten
from nervure.spec import Batch

# Columns that run as one batch, and most parameters for which that is faster than one by one (measured).
_TOGETHER, _SMALL = 64, 20_000


class Jacobian(Stage):
    """Multiply by J = d outputs / d parameters with ``J @ v`` and by its transpose with ``J.T @ u``.

    Rows are the entries of the main output, samples first, in the order of the batches; columns are the parameters,
    flattened in the model's order, a tied weight once. With one batch its graph is kept, and J v costs two backward
    passes, J'u one; with several batches each is run again for every product, so that memory is that of one batch.

    Args:
        model: The model, in the mode it is in; live dropout and batch normalisation in train mode are refused.
        batches: One batch (inputs, targets) or a sequence of batches; targets are not read.
        parameters: Names or prefixes; None takes all that require a gradient.

    Raises:
        NotDeterministic: If the outputs of one batch differ between two calls.
    """

    def __init__(
        self, model: nn.Module, batches: Batch | Sequence[Batch], *, parameters: Iterable[str] | None = None
    ) -> None:
        super().__init__(model, batches, parameters=parameters, method="the Jacobian operator")
        with self.ready():
            with torch.no_grad():
                shapes = [self.output(inputs).shape for inputs, _ in self.batches]
                once, again = (self.output(self.batches[0][0]) for _ in range(2))
            if not torch.equal(once, again):
                raise NotDeterministic("the outputs of one batch differ between two calls", expected=once, found=again)
            first = self.graph(self.batches[0][0])
            push = first.jacobian(first.output)
            self._require_adjoint(first, push)
            single = len(self.batches) == 1
            self._kept = first if single else None
            self._push = push if single else None
        self.rows = [shape.numel() for shape in shapes]
        self._one_by_one = self.size > _SMALL

    @property
    def shape(self) -> tuple[int, int]:
        """Return the numbers of rows and columns."""
        return sum(self.rows), self.size

    @property
    def T(self) -> Transposed:  # noqa: N802 - as torch calls it
        """Return the transpose."""
        return Transposed(self)

    def __matmul__(self, vector: Tensor) -> Tensor:
        """Return J v for a vector, shape (P,), or the columns of a matrix, shape (P, K)."""
        columns = _columns(vector, self.size)
        with self.ready():
            parts = [self._each(push, columns).flatten(1) for push in map(self._pushes, self.batches)]
        return torch.cat(parts, 1).T.reshape(self.shape[0], *vector.shape[1:])

    def transposed_product(self, vector: Tensor) -> Tensor:
        """Return J'u for a vector, shape (M,), or the columns of a matrix, shape (M, K)."""
        columns = _columns(vector, self.shape[0])
        total = columns.new_zeros(len(columns), self.size)
        with self.ready():
            for (inputs, _), part in zip(self.batches, columns.split(self.rows, 1), strict=True):
                graph = self._kept or self.graph(inputs)
                pull = partial(graph.pull, graph.output)
                total += self._each(pull, part.reshape(len(part), *graph.output.shape))
        return total.T.reshape(self.size, *vector.shape[1:])

    def _require_adjoint(self, graph: Graph, push: Multiply) -> None:
        """Check u'(J v) = (J'u)'v for random u and v: J v needs the backward pass itself to be differentiable.

        Raises:
            Unsupported: If they differ.
        """
        source = torch.Generator().manual_seed(0)
        v = torch.randn(self.size, generator=source, dtype=torch.float64).to(self.device, self.dtype)
        u = torch.randn(graph.output.shape, generator=source, dtype=torch.float64).to(graph.output)
        pushed, pulled = push(v), graph.pull(graph.output, u)
        scale = torch.maximum(u.norm() * pushed.norm(), pulled.norm() * v.norm())
        if ((u * pushed).sum() - pulled @ v).abs() > torch.finfo(self.dtype).eps ** 0.5 * scale:
            raise Unsupported(
                self.method, self.model, why="the gradient of one of its operations cannot itself be differentiated"
            )

    def _pushes(self, batch: Batch) -> Multiply:
        if self._push is not None:
            return self._push
        graph = self.graph(batch[0])
        return graph.jacobian(graph.output)

    def dense(self) -> Tensor:
        """Return the matrix itself, shape (M, P), by the fewer products."""
        rows, columns = self.shape
        if rows <= columns:
            return (self.T @ torch.eye(rows, dtype=self.dtype, device=self.device)).T
        return self @ torch.eye(columns, dtype=self.dtype, device=self.device)

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Cut a flat parameter vector into tensors by parameter name."""
        return unflatten(vector, self.parameters)

    def _each(self, multiply: Multiply, vectors: Tensor) -> Tensor:
        """Multiply every vector: as a batch where that agrees with the first one alone, else one by one."""
        if not len(vectors):
            return multiply(vectors.new_zeros(vectors.shape[1:])).unsqueeze(0)[:0]
        alone = multiply(vectors[0])
        if not self._one_by_one and len(vectors) > 1:
            try:
                with warnings.catch_warnings():
                    # Operations without a batching rule run one by one, with a warning.
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    found = torch.cat([multiply(part) for part in vectors.split(_TOGETHER)])
                if (found[0] - alone).norm() <= torch.finfo(alone.dtype).eps ** 0.5 * alone.norm():
                    return found
            except (RuntimeError, NotImplementedError):
                pass  # The model holds an operation that cannot be batched; one by one needs none.
            self._one_by_one = True
        return torch.stack([alone, *(multiply(vector) for vector in vectors[1:])])


class Transposed:
    """Multiply by the transpose of a Jacobian.

    Args:
        jacobian: The Jacobian, which ``T`` gives back.
    """

    def __init__(self, jacobian: Jacobian) -> None:
        self.T = jacobian

    @property
    def shape(self) -> tuple[int, int]:
        """Return the numbers of rows and columns."""
        return self.T.shape[1], self.T.shape[0]

    def __matmul__(self, vector: Tensor) -> Tensor:
        """Return J'u for a vector, shape (M,), or the columns of a matrix, shape (M, K)."""
        return self.T.transposed_product(vector)

    def dense(self) -> Tensor:
        """Return the matrix itself, shape (P, M)."""
        return self.T.dense().T


def jacobian(
    model: nn.Module, batches: Batch | Sequence[Batch], *, parameters: Iterable[str] | None = None
) -> Jacobian:
    """Return the Jacobian of the outputs with respect to the parameters as an operator.

    Args:
        model: The model.
        batches: As in `Jacobian`; targets are not read.
        parameters: Names or prefixes; None takes all that require a gradient.

    Returns:
        The operator.

    Examples:
        >>> model, batch = nn.Linear(2, 3), (torch.randn(8, 2), torch.zeros(8))
        >>> J = jacobian(model, batch)
        >>> J.shape, (J @ torch.ones(9)).shape, (J.T @ torch.ones(24, 2)).shape
        ((24, 9), torch.Size([24]), torch.Size([9, 2]))
    """
    return Jacobian(model, batches, parameters=parameters)


def _columns(vector: Tensor, length: int) -> Tensor:
    """Return a vector, or the columns of a matrix, as rows.

    Raises:
        UsageError: If the shape is neither (length,) nor (length, K).
    """
    if vector.ndim not in (1, 2) or len(vector) != length:
        raise UsageError(
            "the vector does not fit the operator", expected=f"({length},) or ({length}, K)", found=tuple(vector.shape)
        )
    return vector.reshape(length, -1).T if vector.numel() else vector.new_zeros(0, length)
