"""Gradients of the loss of each sample on its own: in full, as sums of squares, as norms and inner products.

The loss of a sample is the loss of a batch that holds it alone. Linear layers are never written out where a product
of their factors is enough: sum_n (g_n a_n')^2 = (g^2)'(a^2), |g a'|^2 = |g|^2 |a|^2 and <g a', h b'> = <g, h><a, b>.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from nervure._kit import UsageError
from nervure.core.forward import batch_size, take
from nervure.core.jacobian import PROBE, Engine, Rows, expand
from nervure.spec import Batch

Loss = Callable[[Tensor, Tensor], Tensor]
"""From the main output and the targets of a batch to a scalar."""

MEMORY = 2**28


class PerSample:
    """Compute gradients of each sample, for any module, in chunks that fit a memory budget.

    The closed form of a layer is used where it was shown to be right on the first samples of the batch; other
    parameters take ``torch.func.vmap`` and at last a loop (see `nervure.core.jacobian.Engine`).

    Args:
        model: The model, in the mode it is in; batch normalisation must be in eval mode.
        batch: A typical batch (inputs, targets), on which the routes are chosen.
        loss: From (output, targets) of a batch to a scalar.
        parameters: Names or prefixes; None takes all that require a gradient.
        memory: Bytes the gradients of one chunk may take.

    Raises:
        UsageError: If the budget is not positive.

    Examples:
        >>> model, batch = nn.Linear(3, 2), (torch.randn(5, 3), torch.zeros(5, 2))
        >>> gradients = PerSample(model, batch, nn.functional.mse_loss).gradients(batch)
        >>> gradients["weight"].shape
        torch.Size([5, 2, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        loss: Loss,
        *,
        parameters: Iterable[str] | None = None,
        memory: int = MEMORY,
    ) -> None:
        if memory <= 0:
            raise UsageError("the memory budget is not positive", expected="bytes above 0", found=memory)
        self.engine = Engine(model, batch[0], parameters)
        self.loss = loss
        with self.engine.trace(take(batch[0], slice(0, PROBE))) as trace:
            factored = trace.factored
        sizes = {name: value.numel() * value.element_size() for name, value in self.engine.chosen.items()}
        explicit = sum(size for name, size in sizes.items() if name not in factored)
        self.chunk = max(1, memory // max(1, sum(sizes.values())))
        self._factored_chunk = max(1, memory // max(1, explicit))

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Return the gradient of every sample.

        Args:
            batch: (inputs, targets), N samples.

        Returns:
            Name -> gradients, shape (N, *shape).
        """
        parts = [{name: value[0] for name, value in expand(rows).items()} for rows in self._chunks(batch, self.chunk)]
        if len(parts) == 1:
            return {name: parts[0][name] for name in self.engine.chosen}
        return {name: torch.cat([part[name] for part in parts]) for name in self.engine.chosen}

    def squared_sums(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sum over samples of the squared gradients: N times the diagonal empirical Fisher.

        Args:
            batch: (inputs, targets).

        Returns:
            Name -> sum of squares, shape of the parameter.
        """
        total = {name: torch.zeros_like(value.detach()) for name, value in self.engine.chosen.items()}
        for rows in self._chunks(batch):
            for name, value in squared_sums(rows).items():
                total[name] += value
        return total

    def squared_norms(self, batch: Batch) -> Tensor:
        """Return the squared norm of the gradient of every sample.

        Args:
            batch: (inputs, targets), N samples.

        Returns:
            Shape (N,).
        """
        return torch.cat([torch.stack(list(_squared_norms(rows).values())).sum(0) for rows in self._chunks(batch)])

    def against(self, batch: Batch, direction: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return how long each sample's gradient is and how far it goes along a direction, parameter by parameter.

        Args:
            batch: (inputs, targets), N samples.
            direction: Name -> a tensor of the parameter's shape.

        Returns:
            Name -> squared norms |g_n|^2 and inner products <g_n, direction>, each of shape (N,).
        """
        parts = []
        for rows in self._chunks(batch):
            norms, along = _squared_norms(rows), _products(rows, direction)
            parts.append({name: (norms[name], along[name]) for name in norms})
        return {
            name: (torch.cat([part[name][0] for part in parts]), torch.cat([part[name][1] for part in parts]))
            for name in self.engine.chosen
        }

    def inner_products(self, batch: Batch) -> Tensor:
        """Return the inner products of the gradients of all pairs of samples.

        The explicit gradients of the whole batch are held at once; linear layers stay factors.

        Args:
            batch: (inputs, targets), N samples.

        Returns:
            Shape (N, N).
        """
        inputs, targets = batch
        with self.engine.trace(inputs) as trace:
            rows = trace.rows(_cotangent(self.loss, trace.output, targets))
        gram: Tensor | int = 0
        for value in rows.explicit.values():
            flat = value[0].flatten(1)
            gram = gram + flat @ flat.T
        for outer in rows.outers:
            gram = gram + outer.inside() * (outer.g[0] @ outer.g[0].T)
        return torch.as_tensor(gram)

    def _chunks(self, batch: Batch, size: int | None = None) -> Iterator[Rows]:
        inputs, targets = batch
        step = size or self._factored_chunk
        for start in range(0, batch_size(inputs), step):
            part = slice(start, start + step)
            with self.engine.trace(take(inputs, part)) as trace:
                rows = trace.rows(_cotangent(self.loss, trace.output, take(targets, part)))
            yield rows


def squared_sums(rows: Rows) -> dict[str, Tensor]:
    """Return the sum over rows of the squared entries, without writing linear layers out.

    Args:
        rows: Jacobian rows, O cotangents of N samples.

    Returns:
        Name -> sum of squares, shape of the parameter.
    """
    total = {name: value.square().sum((0, 1)) for name, value in rows.explicit.items()}
    for outer in rows.outers:
        square = outer.g.square().sum(0)
        if outer.weight:
            total[outer.weight] = square.T @ outer.a.square()
        if outer.bias:
            total[outer.bias] = square.sum(0)
    return total


def _squared_norms(rows: Rows) -> dict[str, Tensor]:
    found = {name: _squares(value[0].flatten(1)) for name, value in rows.explicit.items()}
    for outer in rows.outers:
        size = _squares(outer.g[0])
        if outer.weight:
            found[outer.weight] = size * _squares(outer.a)
        if outer.bias:
            found[outer.bias] = size
    return found


def _squares(rows: Tensor) -> Tensor:
    """Return the sum of squares of each row, in one pass over them."""
    return torch.linalg.vector_norm(rows, dim=1).square()


def _products(rows: Rows, direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {name: value[0].flatten(1) @ direction[name].flatten() for name, value in rows.explicit.items()}
    for outer in rows.outers:
        g = outer.g[0]
        if outer.weight:
            found[outer.weight] = ((g @ direction[outer.weight]) * outer.a).sum(1)
        if outer.bias:
            found[outer.bias] = g @ direction[outer.bias]
    return found


def sample_losses(loss: Loss, output: Tensor, targets: Any) -> Tensor:
    """Return the loss of every sample: the loss of a batch that holds it alone.

    Args:
        loss: From (output, targets) to a scalar.
        output: Shape (N, ...).
        targets: Targets, first axis N.

    Returns:
        Shape (N,).
    """
    if isinstance(targets, Tensor):
        try:
            return vmap(lambda o, t: loss(o.unsqueeze(0), t.unsqueeze(0)).reshape(()))(output, targets)
        except RuntimeError:
            # The loss holds an operation vmap has no rule for; the loop below needs none.
            pass
    parts = [slice(n, n + 1) for n in range(len(output))]
    return torch.stack([loss(output[part], take(targets, part)).reshape(()) for part in parts])


def _cotangent(loss: Loss, output: Tensor, targets: Any) -> Tensor:
    """Return the gradient of each sample's loss with respect to its own output, shape (1, N, ...)."""
    leaf = output.detach().requires_grad_()
    return torch.autograd.grad(sample_losses(loss, leaf, targets).sum(), leaf)[0].unsqueeze(0)
