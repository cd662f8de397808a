"""Derivatives of fields by their coordinates, and modules that show them to a training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nervure.core import forward


def _differentiable(model: Callable[..., Any], x: Tensor) -> tuple[Tensor, Tensor]:
    points = x if x.requires_grad else x.detach().requires_grad_(True)
    return points, forward.outputs(model, points)


def _rows(values: Tensor, points: Tensor, *, create_graph: bool) -> Tensor:
    """Return the derivative of each of the K columns of values (N, K), shape (N, K, in)."""
    pick = torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
    pick = pick.unsqueeze(1).expand(-1, len(values), -1)
    flat = values.new_zeros(*values.shape, points.shape[-1])  # where values do not depend on the point
    if not values.requires_grad:
        return flat
    (found,) = torch.autograd.grad(
        values, points, pick, is_grads_batched=True, create_graph=create_graph, allow_unused=True
    )
    return flat if found is None else found.movedim(0, 1)


def gradient(model: Callable[..., Any], x: Tensor) -> Tensor:
    """Return the derivatives of a field's values by its coordinates, differentiable in the weights.

    Args:
        model: A field: treats every point by itself and gives (N, out).
        x: Points, shape (N, in).

    Returns:
        Shape (N, out, in); detached where the caller has gradients switched off.

    Examples:
        >>> gradient(lambda x: x**2, torch.tensor([[3.0]])).tolist()
        [[[6.0]]]
    """
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        points, values = _differentiable(model, x)
        return _rows(values, points, create_graph=keep)


def laplacian(model: Callable[..., Any], x: Tensor) -> Tensor:
    """Return the sum of a field's unmixed second derivatives, differentiable in the weights.

    Args:
        model: As in `gradient`.
        x: Points, shape (N, in).

    Returns:
        Shape (N, out); detached where the caller has gradients switched off.
    """
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        points, values = _differentiable(model, x)
        slopes = _rows(values, points, create_graph=True)
        second = _rows(slopes.flatten(1), points, create_graph=keep)
    return second.unflatten(1, slopes.shape[1:]).diagonal(dim1=2, dim2=3).sum(-1)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Return |found - truth| / |truth| in the Euclidean norm.

    Args:
        found: The estimate.
        truth: The truth, not all zero.

    Returns:
        At least 0.
    """
    return float((found - truth).norm() / truth.norm())


class Gradient(nn.Module):
    """Show a field's gradient as a module's output, so that any training loop can fit it to given gradients.

    Args:
        model: The field.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return `gradient` of the field, shape (N, out, in)."""
        return gradient(self.model, x)


class Laplacian(nn.Module):
    """Show a field's Laplacian as a module's output, so that any training loop can fit it.

    Args:
        model: The field.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return `laplacian` of the field, shape (N, out)."""
        return laplacian(self.model, x)
