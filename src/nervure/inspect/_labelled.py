"""Features of a network's layers with the label of each row, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nervure._kit import BadData, Unsupported
from nervure.core import heads
from nervure.core.features import features, samples
from nervure.spec import Batch

LAST = "features"
"""The name of the last linear layer's inputs."""


@dataclass(frozen=True)
class Labelled:
    """Hold what layers put out on a batch.

    Args:
        rows: Layer -> features, shape (N, F).
        labels: Shape (N,).
        decisions: The network's classes, shape (N,).
        weight: Class weights of the last linear layer, shape (C, F); None where other layers were asked for.
    """

    rows: dict[str, Tensor]
    labels: Tensor
    decisions: Tensor
    weight: Tensor | None


def labelled(
    model: nn.Module, batches: Sequence[Batch], layers: Sequence[str] | None, *, method: str
) -> Iterator[Labelled]:
    """Run a network over batches in eval mode.

    Args:
        model: The network, left as it is.
        batches: Batches of (inputs, class numbers); a label below 0 is none.
        layers: Names of modules whose outputs are looked at; None takes the inputs of the last linear layer.
        method: Who asks.

    Yields:
        One for each batch.

    Raises:
        BadData: If targets are no class numbers.
        Unsupported: If a layer's outputs have no row for each label.
    """
    for inputs, targets in batches:
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            raise BadData("the targets are no class numbers", expected="whole numbers", found=type(targets).__name__)
        labels = targets.flatten()
        if layers is None:
            seen = heads.head(model, inputs, method=method)
            rows, scores, weight = {LAST: seen.features}, seen.scores, seen.weight
        else:
            every = features(model, inputs, [*layers, ""])
            scores, weight = every[""][-1].flatten(0, -2), None
            rows = {name: _rows(name, every.get(name, []), len(labels), method) for name in layers}
        for name, value in (*rows.items(), ("the model", scores)):
            if len(value) != len(labels):
                raise Unsupported(method, name, why=f"{len(value)} rows of features meet {len(labels)} labels")
        yield Labelled(rows, labels.to(scores.device), scores.argmax(1), weight)


def _rows(name: str, calls: Sequence[Tensor], count: int, method: str) -> Tensor:
    """Return a row for each sample, or for each position where these have the labels.

    Raises:
        Unsupported: If there is nothing to return.
    """
    if not calls:
        raise Unsupported(method, name, why="the layer is not called or gives no real numbers")
    whole = samples(calls) if all(len(one) == len(calls[0]) for one in calls) else torch.cat(list(calls)).flatten(1)
    if len(whole) == count or calls[0].ndim < 3:
        return whole
    return torch.cat([one.flatten(0, -2) for one in calls])
