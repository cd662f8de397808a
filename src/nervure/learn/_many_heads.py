"""One feature extractor with several linear heads on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nervure._kit import Unsupported
from nervure.core import forward
from nervure.core.distillation import distillation


class ManyHeads(nn.Module):
    """Read several predictions off the same features.

    Args:
        extractor: From inputs to features, shape (N, ...); flattened to a row a sample.
        width: Features a sample.
        heads: Number of heads.
        classes: Outputs of each.
    """

    def __init__(self, extractor: nn.Module, *, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.extractor, self.heads = extractor, heads
        self.head = nn.Linear(width, heads * classes)

    def features(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return a row of features for each sample."""
        return forward.logits(self.extractor(*args, **kwargs)).flatten(1)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return scores, shape (N, classes) with one head, else (N, heads, classes)."""
        scores: Tensor = self.head(self.features(*args, **kwargs))
        return scores if self.heads == 1 else scores.unflatten(1, (self.heads, -1))


def width_of(extractor: nn.Module, inputs: Any) -> int:
    """Return how many features a sample gets.

    Args:
        extractor: From inputs to features.
        inputs: Some samples.

    Returns:
        The width.

    Raises:
        Unsupported: If it does not put out numbers for each sample.
    """
    count = min(2, forward.batch_size(inputs))
    found = forward.predict(extractor, forward.take(inputs, slice(0, count)))
    if found.ndim < 2 or len(found) != count:
        raise Unsupported("features", extractor, why=f"its outputs have the shape {tuple(found.shape)}")
    return found.flatten(1).shape[1]


@torch.no_grad()
def head_targets(models: Sequence[nn.Module], inputs: Any) -> Tensor:
    """Return the scores of several networks as what the heads of one are to regress.

    Args:
        models: Networks with as many classes each.
        inputs: A batch's inputs.

    Returns:
        Shape (N, networks, classes).
    """
    return torch.stack([forward.predict(model, inputs) for model in models], 1)


def distil_heads(scores: Tensor, targets: Tensor, *, temperature: float = 2.0) -> Tensor:
    """Return the mean over heads of T^2 KL(softmax(targets / T) || softmax(scores / T)).

    Args:
        scores: One network's heads, shape (N, heads, classes).
        targets: As `head_targets` gives them.
        temperature: T, above 0.

    Returns:
        A scalar.

    Examples:
        >>> scores = torch.randn(4, 2, 3)
        >>> round(distil_heads(scores, scores).item(), 6)
        0.0
    """
    flat = scores.flatten(0, 1)
    blank = torch.zeros(len(flat), dtype=torch.long, device=flat.device)
    return distillation(flat, targets.flatten(0, 1), blank, temperature=temperature, share=1.0)
