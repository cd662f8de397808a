"""The linear layer a network's scores come from, caught as it runs: features, class weights and biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nervure._kit import BadData, Unsupported
from nervure.core import forward


@dataclass(frozen=True)
class Head:
    """Hold what the last linear layer computed: scores = features weight' + bias.

    Args:
        features: Its inputs, shape (N, F): one row for each row of scores, so a position of a sequence is a row.
        weight: Class weights, shape (C, F).
        bias: Shape (C,); zeros where the layer has none.
        scores: The network's outputs, shape (N, C).
    """

    features: Tensor
    weight: Tensor
    bias: Tensor
    scores: Tensor


class _Linear(TorchFunctionMode):
    """Keep the last few calls of the linear function, by whatever module they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is F.linear:
            inputs, weight, bias = [*args, *(kwargs or {}).values(), None][:3]
            self.calls = [*self.calls[-7:], (inputs, weight, bias, found)]
        return found


def head(model: nn.Module, inputs: Any, *, method: str) -> Head:
    """Return the last linear layer's part in the scores of a batch, in eval mode and without gradients.

    Args:
        model: The network, left as it is.
        inputs: A batch's inputs.
        method: Whose error it is where there is no such layer.

    Returns:
        Features, weights and scores.

    Raises:
        BadData: If the outputs are not finite.
        Unsupported: If the network's outputs are not those of a linear layer.
    """
    with forward.mode(model, train=False), torch.no_grad(), _Linear() as seen:
        scores = forward.outputs(model, inputs)
    if not bool(scores.isfinite().all()):
        raise BadData("the network's outputs are not finite", found="NaN or infinity", try_="an earlier checkpoint")
    for features, weight, bias, made in reversed(seen.calls):
        if made.shape == scores.shape and torch.equal(made, scores):
            rows, classes = features.reshape(-1, features.shape[-1]), len(weight)
            return Head(
                rows.detach(),
                weight.detach().clone(),
                torch.zeros(classes, dtype=rows.dtype, device=rows.device) if bias is None else bias.detach().clone(),
                made.detach().reshape(-1, classes),
            )
    raise Unsupported(method, model, why="its outputs are not those of a linear layer", try_="a network that ends so")
