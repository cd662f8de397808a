"""Rows whose outer products are each sample's own Gauss-Newton matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from nervure._kit import BadData
from nervure.core.jacobian import Engine, Rows
from nervure.core.persample import Loss, sample_losses
from nervure.spec import Batch


def curved_rows(engine: Engine, batch: Batch, loss: Loss) -> Rows:
    """Return the rows of A^1/2 J, A being the Hessian of each sample's loss with respect to its outputs.

    The mean over samples of their outer products is the Gauss-Newton matrix.

    Args:
        engine: The engine of the model.
        batch: Inputs and targets, N samples of O output entries.
        loss: From (output, targets) to the mean loss of a batch; convex in the outputs.

    Returns:
        O rows of each sample.
    """
    with engine.trace(batch[0]) as trace:
        output = trace.output.detach()
        roots = _roots(loss, output, batch[1]).to(output)
        return trace.rows(roots.transpose(0, 1).reshape(-1, *output.shape))


def traces(rows: Rows) -> Tensor:
    """Return the trace of each sample's Gauss-Newton matrix: the sum of its rows' squares.

    Args:
        rows: From `curved_rows`.

    Returns:
        Float64, shape (N,).
    """
    parts = [value.flatten(2).double().square().sum((0, 2)) for value in rows.explicit.values()]
    for outer in rows.outers:
        size = outer.g.double().square().sum((0, 2))
        if outer.weight:
            parts.append(size * outer.a.double().square().sum(1))
        if outer.bias:
            parts.append(size)
    return torch.stack(parts).sum(0)


def _roots(loss: Loss, output: Tensor, targets: Tensor) -> Tensor:
    """Return A^1/2 of every sample, rows first, shape (N, O, O).

    Raises:
        BadData: If one has a negative eigenvalue.
    """
    leaf = output.detach().double().requires_grad_()
    wide = targets.double() if isinstance(targets, Tensor) and targets.is_floating_point() else targets
    total = sample_losses(loss, leaf, wide).sum()
    gradient = torch.autograd.grad(total, leaf, create_graph=True)[0].reshape(len(output), -1)
    if not gradient.requires_grad:
        return output.new_zeros(len(output), gradient.shape[1], gradient.shape[1])
    eye = torch.eye(gradient.shape[1], dtype=gradient.dtype, device=gradient.device)
    seeds = eye.unsqueeze(1).expand(-1, len(output), -1)
    found = torch.autograd.grad(gradient, leaf, seeds, is_grads_batched=True)[0]
    A = found.reshape(len(eye), len(output), -1).transpose(0, 1)
    values, vectors = torch.linalg.eigh((A + A.mT) / 2)
    if float(values.min()) < -1e-6 * float(values.abs().max()):
        raise BadData("the loss is not convex in the outputs", expected="eigenvalues >= 0", found=float(values.min()))
    return values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT
