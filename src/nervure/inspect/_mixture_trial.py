"""What the claims on mixtures draw and run."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK, LABELS = 20_000, 20


def logistic_models(draw: torch.Generator, inputs: int, n: int, models: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw logistic models from a standard normal prior, and labels of a truth of unit weights.

    Returned are the models' total losses on each draw of the labels, shape (models, draws), the truth's, and the
    models' mean divergences from it.
    """
    x = torch.randn(n, inputs, generator=draw, dtype=torch.float64)
    scores = x @ torch.ones(inputs, dtype=torch.float64)
    p = scores.sigmoid()
    labels = (torch.rand(n, LABELS, generator=draw, dtype=torch.float64) < p[:, None]).double()
    entropy = F.binary_cross_entropy_with_logits(scores, p, reduction="none")
    losses, divergences = [], []
    for start in range(0, models, CHUNK):
        weights = torch.randn(min(CHUNK, models - start), inputs, generator=draw, dtype=torch.float64)
        logits = weights @ x.T
        plus = F.softplus(logits)
        # The loss of a label y is softplus(s) - y s.
        losses.append(plus.sum(1, keepdim=True) - logits @ labels)
        divergences.append((plus - logits * p - entropy).mean(1))
    truth = F.softplus(scores).sum() - scores @ labels
    return torch.cat(losses), truth, torch.cat(divergences)


def langevin(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    new: Tensor,
    *,
    steps: int,
    temperature: float,
    draw: torch.Generator,
    tick: Callable[[float, float, str], None],
    size: float = 1e-4,
    every: int = 50,
) -> tuple[Tensor, Tensor]:
    """Run Langevin dynamics on the negative log posterior and return log predictions on new inputs.

    theta <- theta - size / 2 grad U + sqrt(size T) noise, U the summed log loss plus |theta|^2 / 2. The first result is
    the average over snapshots of the second half, the second that of the last iterate.
    """
    parameters = list(model.parameters())
    snapshots: list[Tensor] = []
    for step in range(1, steps + 1):
        loss = F.cross_entropy(model(x), y, reduction="sum")
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for value, gradient in zip(parameters, gradients, strict=True):
                value.sub_(0.5 * size * (gradient + value))
                if temperature > 0:
                    value.add_((size * temperature) ** 0.5 * torch.randn(value.shape, generator=draw))
            if step > steps // 2 and step % every == 0:
                snapshots.append(model(new).double().log_softmax(1))
        if step % 200 == 0:
            tick(step, steps, f"step {step}")
    last = model(new).detach().double().log_softmax(1)
    mixed = torch.stack(snapshots) if snapshots else last[None]
    return torch.logsumexp(mixed, 0) - torch.tensor(float(len(mixed))).log(), last
