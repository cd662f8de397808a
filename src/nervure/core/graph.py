"""What every operator over a model's parameters needs: the model run safely, and products with its derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nervure._kit import BadData
from nervure.core.capture import refuse_batch_statistics, refuse_complex, require_samples, undisturbed, without_draws
from nervure.core.forward import batch_size, outputs
from nervure.core.vectors import flatten, only, select
from nervure.spec import Batch

Multiply = Callable[[Tensor], Tensor]
_KEEP: dict[str, Any] = {"create_graph": True, "allow_unused": True}


class Graph:
    """Hold one batch's forward pass and differentiate through it as often as asked.

    Args:
        output: The main output, shape (N, ...), with its graph.
        parameters: The chosen parameters.
    """

    def __init__(self, output: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        self.output, self.parameters = output, parameters

    def hessian(self, value: Tensor) -> Multiply:
        """Return v -> H v of a scalar of the graph.

        Args:
            value: The scalar.

        Returns:
            The product.
        """
        gradient = self._gradient(value)
        return lambda v: self.pull(gradient, v)

    def jacobian(self, values: Tensor) -> Multiply:
        """Return v -> J v of a tensor of the graph, by two backward passes.

        Args:
            values: The tensor.

        Returns:
            The map from a flat vector to a tensor of the shape of `values`; from K vectors, shape (K, P), to K such.
        """
        u = torch.zeros_like(values).requires_grad_()
        gradient = self._gradient(values, u)

        def multiply(v: Tensor) -> Tensor:
            found = None
            if gradient.requires_grad:
                found = torch.autograd.grad(
                    gradient, u, v, retain_graph=True, allow_unused=True, is_grads_batched=v.ndim > 1
                )[0]
            return values.new_zeros(v.shape[:-1] + values.shape) if found is None else found.detach()

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
        return lambda v: self.pull(values, middle(push(v)))

    def pull(self, values: Tensor, cotangent: Tensor) -> Tensor:
        """Return J' u of a tensor of the graph.

        Args:
            values: The tensor J is the Jacobian of.
            cotangent: u, shape of `values`; or K such, shape (K, ...).

        Returns:
            A flat vector without a graph, or K such.
        """
        found: Sequence[Tensor | None] = [None] * len(self.parameters)
        many = cotangent.ndim > values.ndim
        if values.requires_grad:
            found = torch.autograd.grad(
                values, self.parameters, cotangent, retain_graph=True, allow_unused=True, is_grads_batched=many
            )
        if not many:
            return self._flat(found).detach()
        count = len(cotangent)
        pairs = zip(found, self.parameters, strict=True)
        rows = [value.new_zeros(count, value.numel()) if g is None else g.flatten(1) for g, value in pairs]
        return torch.cat(rows, 1).detach()

    def _gradient(self, values: Tensor, cotangent: Tensor | None = None) -> Tensor:
        if not values.requires_grad:
            return self._flat([None] * len(self.parameters))
        return self._flat(torch.autograd.grad(values, self.parameters, cotangent, **_KEEP))

    def _flat(self, found: Iterable[Tensor | None]) -> Tensor:
        pairs = zip(found, self.parameters, strict=True)
        return flatten([torch.zeros_like(value) if g is None else g for g, value in pairs])


class Stage:
    """Run a model on batches, with a graph for the chosen parameters only, and leave it as it was.

    Args:
        model: The model, in the mode it is in; live dropout and batch normalisation in train mode are refused.
        batches: One batch (inputs, targets) or a sequence of batches.
        parameters: Names or prefixes; None takes all that require a gradient.
        method: Who asks, for error messages.

    Raises:
        BadData: If there is no batch.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batch | Sequence[Batch],
        *,
        parameters: Iterable[str] | None = None,
        method: str = "curvature operators",
    ) -> None:
        refuse_batch_statistics(model, method)
        self.model, self.method = model, method
        self.batches = as_batches(batches)
        if not self.batches:
            raise BadData("there is no batch", expected="at least one (inputs, targets)")
        self.parameters = select(model, parameters)
        refuse_complex(model, self.parameters, method)
        self.samples = sum(batch_size(inputs) for inputs, _ in self.batches)
        first = next(iter(self.parameters.values()))
        self.size = sum(value.numel() for value in self.parameters.values())
        self.dtype, self.device = first.dtype, first.device

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Open a block in which `output` may be called.

        Yields:
            Nothing.
        """
        # The fused attention kernels, and cuDNN's recurrent ones, have no second derivative.
        recurrent = self.device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in self.model.modules())
        with contextlib.ExitStack() as stack:
            stack.enter_context(only(self.model, self.parameters))
            stack.enter_context(undisturbed(self.model))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if recurrent:
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield

    def output(self, inputs: Any) -> Tensor:
        """Return the main output with its graph.

        Args:
            inputs: A batch's inputs.

        Returns:
            Shape (N, ...).
        """
        with without_draws(self.model, self.method):
            output = outputs(self.model, inputs)
        require_samples(output, batch_size(inputs))
        return output

    def graph(self, inputs: Any) -> Graph:
        """Return the graph of one batch.

        Args:
            inputs: A batch's inputs.

        Returns:
            The graph.
        """
        return Graph(self.output(inputs), list(self.parameters.values()))


def joined(batches: Sequence[Batch]) -> Batch:
    """Return all samples as one batch.

    Args:
        batches: At least one.

    Returns:
        Inputs and targets.

    Raises:
        BadData: If there are several of structured inputs.
    """
    if len(batches) == 1:
        return batches[0]
    if not all(isinstance(inputs, Tensor) for inputs, _ in batches):
        raise BadData("several batches of structured inputs", expected="one batch, or tensors")
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([targets for _, targets in batches])


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
