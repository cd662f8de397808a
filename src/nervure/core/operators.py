"""Curvature matrices of a loss as linear operators over flat parameter vectors; none is ever formed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nervure._kit import BadData, NotDeterministic, UsageError
from nervure.core.capture import refuse_batch_statistics, require_samples, undisturbed, without_draws
from nervure.core.forward import batch_size, outputs
from nervure.core.persample import Loss, sample_losses
from nervure.core.vectors import flatten, only, select, unflatten
from nervure.spec import Batch

Likelihood = Literal["categorical", "gaussian"]
Multiply = Callable[[Tensor], Tensor]


class Graph:
    """Hold one batch's forward pass and differentiate through it as often as asked.

    Args:
        output: The main output, shape (N, ...), with its graph.
        targets: The targets.
        loss: From (output, targets) to the mean loss of the batch.
        parameters: The chosen parameters.
    """

    def __init__(self, output: Tensor, targets: Any, loss: Loss, parameters: Sequence[nn.Parameter]) -> None:
        self.output, self.targets, self.loss, self.parameters = output, targets, loss, parameters
        self._gradients: dict[int, tuple[Tensor, Tensor]] = {}

    def hessian(self) -> Multiply:
        """Return v -> H v of the mean loss."""
        gradient = self._flat(torch.autograd.grad(self.loss(self.output, self.targets), self.parameters, **_KEEP))
        return lambda v: self._pull(gradient, v)

    def jacobian(self, values: Tensor) -> Multiply:
        """Return v -> J v of a tensor of the graph, by two backward passes.

        Args:
            values: The tensor.

        Returns:
            The map from a flat vector to a tensor of the shape of `values`.
        """
        u = torch.zeros_like(values).requires_grad_()
        gradient = self._flat(torch.autograd.grad(values, self.parameters, u, **_KEEP))

        def multiply(v: Tensor) -> Tensor:
            if not gradient.requires_grad:
                return torch.zeros_like(values)
            found = torch.autograd.grad(gradient, u, v, retain_graph=True, allow_unused=True)[0]
            return torch.zeros_like(values) if found is None else found

        return multiply

    def sandwich(self, values: Tensor, middle: Multiply) -> Multiply:
        """Return v -> J' M J v.

        Args:
            values: The tensor J is the Jacobian of.
            middle: The symmetric map M.

        Returns:
            The product.
        """
        push = self.jacobian(values)
        return lambda v: self._pull(values, middle(push(v)))

    def output_hessian(self) -> Multiply:
        """Return u -> (Hessian of the mean loss with respect to the output) u."""
        leaf = self.output.detach().requires_grad_()
        gradient = torch.autograd.grad(self.loss(leaf, self.targets), leaf, create_graph=True)[0]

        def multiply(u: Tensor) -> Tensor:
            if not gradient.requires_grad:
                return torch.zeros_like(u)
            found = torch.autograd.grad(gradient, leaf, u, retain_graph=True, allow_unused=True)[0]
            return torch.zeros_like(u) if found is None else found

        return multiply

    def _pull(self, values: Tensor, cotangent: Tensor) -> Tensor:
        if not values.requires_grad:
            return torch.cat([torch.zeros_like(value).flatten() for value in self.parameters])
        found = torch.autograd.grad(values, self.parameters, cotangent, retain_graph=True, allow_unused=True)
        return self._flat(found).detach()

    def _flat(self, found: Iterable[Tensor | None]) -> Tensor:
        pairs = zip(found, self.parameters, strict=True)
        return flatten([torch.zeros_like(value) if g is None else g for g, value in pairs])


_KEEP: dict[str, Any] = {"create_graph": True, "allow_unused": True}


class Operator:
    """Multiply flat parameter vectors by a symmetric matrix that belongs to a model, a loss and batches.

    With one batch its graph is kept and every product costs one or two backward passes; with several batches each is
    run again for every product and their products are averaged by their numbers of samples, so that memory is that of
    one batch.

    Args:
        model: The model, in the mode it is in; live dropout and batch normalisation in train mode are refused.
        batches: One batch (inputs, targets) or a sequence of batches.
        loss: From (output, targets) to the mean loss of a batch.
        build: From the graph of one batch to the product with that batch's matrix.
        parameters: Names or prefixes; None takes all that require a gradient.

    Raises:
        BadData: If there is no batch.
        NotDeterministic: If the loss of one batch differs between two calls.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batch | Sequence[Batch],
        loss: Loss,
        build: Callable[[Graph], Multiply],
        *,
        parameters: Iterable[str] | None = None,
    ) -> None:
        refuse_batch_statistics(model, "curvature operators")
        self.model, self.loss, self.build = model, loss, build
        self.batches = as_batches(batches)
        if not self.batches:
            raise BadData("there is no batch", expected="at least one (inputs, targets)")
        self.parameters = select(model, parameters)
        self.samples = sum(batch_size(inputs) for inputs, _ in self.batches)
        first = next(iter(self.parameters.values()))
        self.size = sum(value.numel() for value in self.parameters.values())
        self.dtype, self.device = first.dtype, first.device
        self.products = 0
        with self._ready():
            once, again = (self._loss_of(self.batches[0]) for _ in range(2))
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
        with self._ready():
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

    @contextlib.contextmanager
    def _ready(self) -> Iterator[None]:
        # The fused attention kernels, and cuDNN's recurrent ones, have no second derivative.
        recurrent = self.device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in self.model.modules())
        with contextlib.ExitStack() as stack:
            stack.enter_context(only(self.model, self.parameters))
            stack.enter_context(undisturbed(self.model))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if recurrent:
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield

    def _output(self, inputs: Any) -> Tensor:
        with without_draws(self.model, "curvature operators"):
            output = outputs(self.model, inputs)
        require_samples(output, batch_size(inputs))
        return output

    def _loss_of(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self.loss(self._output(batch[0]), batch[1])

    def _multiply(self, batch: Batch) -> Multiply:
        return self.build(Graph(self._output(batch[0]), batch[1], self.loss, list(self.parameters.values())))


def as_batches(batches: Batch | Sequence[Batch]) -> list[Batch]:
    """Return a list of batches from one batch or several.

    Args:
        batches: One (inputs, targets), or a sequence or loader of such.

    Returns:
        The batches.
    """
    if isinstance(batches, tuple) and len(batches) == 2 and isinstance(batches[1], Tensor):
        return [batches]
    return [tuple(batch) for batch in batches]


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

    Example:
        >>> model, batch = nn.Linear(2, 1), (torch.randn(8, 2), torch.randn(8, 1))
        >>> (hessian(model, batch, nn.functional.mse_loss) @ torch.ones(3)).shape
        torch.Size([3])
    """
    return Operator(model, batches, loss, Graph.hessian, parameters=parameters)


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
    return Operator(
        model, batches, loss, lambda graph: graph.sandwich(graph.output, graph.output_hessian()), parameters=parameters
    )


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

    def build(graph: Graph) -> Multiply:
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

    def build(graph: Graph) -> Multiply:
        losses = sample_losses(graph.loss, graph.output, graph.targets)
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

    def build(graph: Graph) -> Multiply:
        losses = sample_losses(graph.loss, graph.output, graph.targets)
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
