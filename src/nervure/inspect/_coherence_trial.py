"""What the claims on gradient coherence train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure.core.forward import predict
from nervure.spec import Ctx


def mixed_labels(truth: Tensor, classes: int, draw: torch.Generator, *, share: float = 0.5) -> Tensor:
    """Return labels of which a share are another class, drawn evenly."""
    wrong = torch.randperm(len(truth), generator=draw)[: int(share * len(truth))]
    labels = truth.clone()
    labels[wrong] = (truth[wrong] + torch.randint(1, classes, (len(wrong),), generator=draw)) % classes
    return labels


def trained(
    ctx: Ctx,
    x: Tensor,
    y: Tensor,
    *,
    epochs: Sequence[int],
    size: int = 50,
    rule: Callable[..., Any] | None = None,
    rate: float = 0.1,
) -> Iterator[tuple[int, nn.Module]]:
    """Train an MLP 64-128-128-10 by SGD; a rule takes the place of backward.

    Yields:
        Each wanted epoch and the network after it.
    """
    model = ctx.model("mlp", features=x.shape[1], hidden=(128, 128), classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    draw, steps = ctx.generator("batches"), 0
    for epoch in range(1, max(epochs) + 1):
        for index in torch.randperm(len(x), generator=draw).split(size):
            optimizer.zero_grad()
            if rule is None:
                F.cross_entropy(model(x[index]), y[index]).backward()
            else:
                rule(model, (x[index], y[index]))
            optimizer.step()
            steps += 1
        ctx.progress(epoch, max(epochs), f"epoch {epoch}")
        if epoch in epochs:
            yield epoch, model


def memorised(model: nn.Module, x: Tensor, truth: Tensor, labels: Tensor) -> float:
    """Return the share of the wrong labels that the model gives back."""
    wrong = truth != labels
    return float((predict(model, x[wrong]).argmax(1) == labels[wrong]).double().mean())
