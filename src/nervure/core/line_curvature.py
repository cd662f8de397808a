"""The curvature of the loss along a straight line between networks, and the gaps it explains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure._kit import UsageError
from nervure.core import forward, rng
from nervure.core.connectivity import interpolated
from nervure.core.graph import as_batches
from nervure.core.operators import hessian
from nervure.core.persample import Loss
from nervure.core.vectors import flatten, select
from nervure.spec import Batch


def mean_loss(batches: Sequence[Batch], loss: Loss) -> Callable[[nn.Module], float]:
    """Return the function from a network to its mean loss over all samples, in eval mode.

    Args:
        batches: Batches (inputs, targets).
        loss: From (output, targets) of a batch to its mean loss.

    Returns:
        The function; it leaves modes and global generators as they were.
    """

    @torch.no_grad()
    def measure(model: nn.Module) -> float:
        total = count = 0.0
        with forward.mode(model, train=False), rng.scope("line"):
            for inputs, targets in batches:
                size = forward.batch_size(inputs)
                total += float(loss(forward.outputs(model, inputs), targets)) * size
                count += size
        return total / count

    return measure


def curvature_gaps(
    first: nn.Module,
    second: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    loss: Loss = F.cross_entropy,
    nodes: int = 3,
    points: int = 11,
    parameters: Iterable[str] | None = None,
) -> Tensor:
    """Compute how far the loss on a line lies above its chord from the curvature along the line.

    gap(t) = -integral over s in [0, 1] of G(t, s) d'H(a + s d) d, with d = b - a and G = min(t, s) (1 - max(t, s)). The
    curvature is measured at the nodes of Gauss and Legendre and integrated as the polynomial through them: with many
    nodes and smooth activations the identity is exact, with one it is the second-order estimate -t (1 - t) d'Hd / 2 at
    the middle. The Hessian does not see the kinks of piecewise linear activations. Running statistics are those of the
    first network all along.

    Args:
        first: The network at 0, left as it is; it is looked at in eval mode.
        second: The network at 1.
        batches: One batch (inputs, targets) or a sequence of batches.
        loss: From (output, targets) to the mean loss of a batch.
        nodes: Number of Hessian-vector products.
        points: Number of evenly spaced places on the line, ends included.
        parameters: Names or prefixes of what moves; None moves everything.

    Returns:
        Shape (points,), float64; 0 at the ends.

    Raises:
        UsageError: If there is no node.

    Examples:
        >>> ends = [nn.Linear(2, 2) for _ in range(2)]
        >>> batch = (torch.randn(16, 2), torch.randint(2, (16,)))
        >>> bool((curvature_gaps(*ends, batch)[1:-1] < 0).all())  # convex
        True
    """
    if nodes < 1:
        raise UsageError("curvature is measured somewhere", expected="nodes >= 1", found=nodes)
    every = as_batches(batches)
    names = [name for name, value in first.named_parameters() if value.is_floating_point()]
    chosen = list(select(first, names if parameters is None else parameters))
    places, weights = np.polynomial.legendre.leggauss(nodes)
    step = difference(first, second, chosen)
    bends = []
    for place in places:
        mixed = interpolated(first, second, (place + 1) / 2, parameters=chosen, buffers=False).eval()
        operator = hessian(mixed, every, loss, parameters=chosen)
        bends.append(float(step @ (operator @ step)))
    degrees = np.arange(nodes)
    legendre = np.polynomial.legendre.legvander(places, nodes - 1)
    coefficients = (2 * degrees + 1) / 2 * (legendre.T @ (weights * np.array(bends)))
    shares = np.linspace(0, 1, points)
    # The gap is the second integral of the curvature that is 0 at both ends; d2/ds2 is 4 d2/dx2 at x = 2 s - 1.
    curve = np.polynomial.legendre.legval(2 * shares - 1, np.polynomial.legendre.legint(coefficients, 2)) / 4
    return torch.from_numpy(curve - curve[0] - (curve[-1] - curve[0]) * shares)


def difference(first: nn.Module, second: nn.Module, names: Sequence[str]) -> Tensor:
    """Return the second network less the first, as one vector.

    Args:
        first: A network.
        second: Another of the same shape.
        names: Its parameters.

    Returns:
        Shape (P,).
    """
    one, other = dict(first.named_parameters()), dict(second.named_parameters())
    return flatten([other[name].detach() - one[name].detach() for name in names])
