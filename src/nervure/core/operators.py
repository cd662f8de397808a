"""Curvature matrices of a loss as linear operators over flat parameter vectors; none is ever formed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nervure._kit import BadData, NotDeterministic, Unsupported, UsageError
from nervure.core.capture import undisturbed
from nervure.core.forward import batch_size, outputs
from nervure.core.graph import Graph, Multiply, Stage, as_batches
from nervure.core.persample import Loss, sample_losses
from nervure.core.vectors import unflatten
from nervure.spec import Batch

Likelihood = Literal["categorical", "gaussian"]
Build = Callable[[Graph, Any], Multiply]


class Operator(Stage):
    """Multiply flat parameter vectors by a symmetric matrix that belongs to a model, a loss and batches.

    With one batch its graph is kept and every product costs one or two backward passes; with several batches each is
    run again for every product and their products are averaged by their numbers of samples, so that memory is that of
    one batch.

    Args:
        model: The model, in the mode it is in; live dropout and batch normalisation in train mode are refused.
        batches: One batch (inputs, targets) or a sequence of batches.
        loss: From (output, targets) to the mean loss of a batch.
        build: From the graph of one batch and its targets to the product with that batch's matrix.
        parameters: Names or prefixes; None takes all that require a gradient.

    Raises:
        BadData: If there is no batch, or the loss is not one finite number.
        Unsupported: If parameters are complex or of half precision.
        NotDeterministic: If the loss of one batch differs between two calls.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batch | Sequence[Batch],
        loss: Loss,
        build: Build,
        *,
        parameters: Iterable[str] | None = None,
    ) -> None:
        super().__init__(model, batches, parameters=parameters)
        self.loss, self.build = loss, build
        self.products = 0
        if self.dtype in (torch.float16, torch.bfloat16):
            why = "half precision has too few digits for curvature"
            raise Unsupported("curvature operators", model, why=why, try_="model.float(), or dtype=torch.float32")
        with self.ready():
            once, again = (self._loss_of(self.batches[0]) for _ in range(2))
            if once.ndim:
                raise BadData(
                    "the loss is not one number", expected="a scalar", found=tuple(once.shape), try_=".mean()"
                )
            if not bool(once.isfinite()):
                raise BadData("the loss is not finite", found=float(once), try_="looking at inputs and weights")
            if not torch.equal(once, again):
                raise NotDeterministic("the loss of one batch differs between two calls", expected=once, found=again)
            self._kept = self._multiply(self.batches[0]) if len(self.batches) == 1 else None

    def __matmul__(self, vector: Tensor) -> Tensor:
        """Multiply a vector, shape (P,), or the columns of a matrix, shape (P, K).

        Raises:
            UsageError: If the length is not P.
        """
        if vector.ndim == 2:
            return torch.stack([self @ column for column in vector.T], 1)
        if vector.shape != (self.size,):
            raise UsageError("the vector does not fit the operator", expected=(self.size,), found=tuple(vector.shape))
        self.products += 1
        with self.ready():
            if self._kept is not None:
                return self._kept(vector)
            total = torch.zeros_like(vector)
            for batch in self.batches:
                total += self._multiply(batch)(vector) * (batch_size(batch[0]) / self.samples)
            return total

    def dense(self) -> Tensor:
        """Return the matrix itself, made symmetric against rounding, shape (P, P)."""
        matrix = self @ torch.eye(self.size, dtype=self.dtype, device=self.device)
        return (matrix + matrix.T) / 2

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Cut a flat vector into tensors by parameter name."""
        return unflatten(vector, self.parameters)

    def _loss_of(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self.loss(self.output(batch[0]), batch[1])

    def _multiply(self, batch: Batch) -> Multiply:
        return self.build(self.graph(batch[0]), batch[1])


def hessian(
    model: nn.Module, batches: Batch | Sequence[Batch], loss: Loss, *, parameters: Iterable[str] | None = None
) -> Operator:
    """Return the Hessian of the mean loss over all samples as an operator.

    Args:
        model: The model.
        batches: As in `Operator`.
        loss: From (output, targets) to the mean loss of a batch.
        parameters: Names or prefixes; None takes all that require a gradient.

    Returns:
        The operator.

    Examples:
        >>> model, batch = nn.Linear(2, 1), (torch.randn(8, 2), torch.randn(8, 1))
        >>> (hessian(model, batch, nn.functional.mse_loss) @ torch.ones(3)).shape
        torch.Size([3])
    """

    def build(graph: Graph, targets: Any) -> Multiply:
        return graph.hessian(loss(graph.output, targets))

    return Operator(model, batches, loss, build, parameters=parameters)


def gauss_newton(
    model: nn.Module, batches: Batch | Sequence[Batch], loss: Loss, *, parameters: Iterable[str] | None = None
) -> Operator:
    """Return the generalised Gauss-Newton matrix J' (d2 loss / d output2) J as an operator.

    Args:
        model: The model.
        batches: As in `Operator`.
        loss: From (output, targets) to the mean loss of a batch.
        parameters: Names or prefixes; None takes all that require a gradient.

    Returns:
        The operator.
    """

    def build(graph: Graph, targets: Any) -> Multiply:
        return graph.sandwich(graph.output, _output_hessian(loss, graph.output, targets))

    return Operator(model, batches, loss, build, parameters=parameters)


def _output_hessian(loss: Loss, output: Tensor, targets: Any) -> Multiply:
    """Return u -> (Hessian of the mean loss with respect to the output) u."""
    leaf = output.detach().requires_grad_()
    gradient = torch.autograd.grad(loss(leaf, targets), leaf, create_graph=True)[0]

    def multiply(u: Tensor) -> Tensor:
        if not gradient.requires_grad:
            return torch.zeros_like(u)
        found = torch.autograd.grad(gradient, leaf, u, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(u) if found is None else found

    return multiply


def fisher(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    likelihood: Likelihood = "categorical",
    parameters: Iterable[str] | None = None,
) -> Operator:
    """Return the exact Fisher matrix: the mean over inputs of E_{y ~ p(y|x)} [g g'].

    Args:
        model: The model; the last axis of its output are logits, or means of unit variance.
        batches: As in `Operator`; targets are not read.
        likelihood: "categorical" or "gaussian".
        parameters: Names or prefixes; None takes all that require a gradient.

    Returns:
        The operator.
    """

    def build(graph: Graph, targets: Any) -> Multiply:
        p = graph.output.detach().softmax(-1)

        def middle(u: Tensor) -> Tensor:
            u = u / len(u)
            return u if likelihood == "gaussian" else p * (u - (p * u).sum(-1, keepdim=True))

        return graph.sandwich(graph.output, middle)

    return Operator(model, batches, lambda output, _: output.sum(), build, parameters=parameters)


def empirical_fisher(
    model: nn.Module, batches: Batch | Sequence[Batch], loss: Loss, *, parameters: Iterable[str] | None = None
) -> Operator:
    """Return the mean over samples of g g', g the gradient of the loss of one sample at its own label.

    Args:
        model: The model.
        batches: As in `Operator`.
        loss: From (output, targets) to the mean loss of a batch.
        parameters: Names or prefixes; None takes all that require a gradient.

    Returns:
        The operator.
    """

    def build(graph: Graph, targets: Any) -> Multiply:
        losses = sample_losses(loss, graph.output, targets)
        return graph.sandwich(losses, lambda u: u / len(u))

    return Operator(model, batches, loss, build, parameters=parameters)


def sampled_fisher(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    seed: int,
    likelihood: Likelihood = "categorical",
    parameters: Iterable[str] | None = None,
) -> Operator:
    """Return the Monte Carlo Fisher matrix: the empirical one with one label for each sample drawn from the model.

    Args:
        model: The model.
        batches: As in `Operator`; targets are not read.
        seed: Seed of the labels, drawn once.
        likelihood: "categorical" or "gaussian".
        parameters: Names or prefixes; None takes all that require a gradient.

    Returns:
        The operator.
    """
    source = torch.Generator().manual_seed(seed)
    drawn: list[Batch] = []
    with torch.no_grad(), undisturbed(model), torch.no_grad():
        for inputs, _ in as_batches(batches):
            drawn.append((inputs, draw_labels(outputs(model, inputs), likelihood, source)))
    return empirical_fisher(model, drawn, negative_log_likelihood(likelihood), parameters=parameters)


def gradient_covariance(
    model: nn.Module, batches: Batch | Sequence[Batch], loss: Loss, *, parameters: Iterable[str] | None = None
) -> Operator:
    """Return the covariance of the gradients of single samples within a batch: mean g g' minus mean g mean g'.

    Args:
        model: The model.
        batches: As in `Operator`; with several batches, the average of their covariances.
        loss: From (output, targets) to the mean loss of a batch.
        parameters: Names or prefixes; None takes all that require a gradient.

    Returns:
        The operator.
    """

    def build(graph: Graph, targets: Any) -> Multiply:
        losses = sample_losses(loss, graph.output, targets)
        return graph.sandwich(losses, lambda u: (u - u.mean()) / len(u))

    return Operator(model, batches, loss, build, parameters=parameters)


def draw_labels(output: Tensor, likelihood: Likelihood, source: torch.Generator) -> Tensor:
    """Draw targets from the model's own predictive distribution.

    Args:
        output: Logits or means.
        likelihood: "categorical" or "gaussian".
        source: A CPU generator.

    Returns:
        Class indices without the last axis, or values of the output's shape.
    """
    if likelihood == "gaussian":
        return output + torch.randn(output.shape, generator=source, dtype=output.dtype).to(output.device)
    flat = output.float().softmax(-1).flatten(0, -2).cpu()
    return torch.multinomial(flat, 1, generator=source).view(output.shape[:-1]).to(output.device)


def negative_log_likelihood(likelihood: Likelihood) -> Loss:
    """Return the loss whose curvature the Fisher matrix is: summed over a sample, averaged over samples.

    Args:
        likelihood: "categorical" or "gaussian".

    Returns:
        From (output, targets) to a scalar.
    """
    if likelihood == "gaussian":
        return lambda output, target: 0.5 * (output - target).square().sum() / len(output)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        chosen = output.log_softmax(-1).gather(-1, target.unsqueeze(-1))
        return -chosen.sum() / len(output)

    return loss
