"""What the claims on neural collapse train."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure.core.forward import predict
from nervure.spec import Ctx

_WIDTH = 16


@dataclass(frozen=True)
class FreeFeatures:
    """Hold a minimum that was reached.

    Args:
        loss: Its loss.
        outputs: Each class's mean output for itself, shape (C,).
        means: Each class's mean features, shape (C, width).
    """

    loss: float
    outputs: Tensor
    means: Tensor


def free_features(
    counts: Sequence[int],
    draw: torch.Generator,
    *,
    weight_decays: Sequence[float],
    feature_decay: float,
    scales: Sequence[float] = (1.0,),
    frozen: bool = False,
) -> FreeFeatures:
    """Minimise 1/(2N) |W_M ... W_1 H - Y|^2 + sum lw_i/2 |W_i|^2 + lh/2 |H|^2 by L-BFGS in float64.

    Zero is a local minimum for every class: matrices start orthogonal, features at some scales, and the start that
    ends lowest counts.
    """
    starts = (_minimum(counts, draw, weight_decays, feature_decay, scale, frozen) for scale in scales)
    return min(starts, key=lambda found: found.loss)


def _minimum(
    counts: Sequence[int],
    draw: torch.Generator,
    weight_decays: Sequence[float],
    feature_decay: float,
    scale: float,
    frozen: bool,
) -> FreeFeatures:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    truth = F.one_hot(labels).T.double()
    shapes = [(_WIDTH, _WIDTH)] * (len(weight_decays) - 1) + [(len(counts), _WIDTH)]
    weights = [
        nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64), generator=draw).requires_grad_()
        for shape in shapes
    ]
    features = scale * torch.randn(_WIDTH, len(labels), generator=draw, dtype=torch.float64) / _WIDTH**0.5
    features.requires_grad_(not frozen)
    optimizer = torch.optim.LBFGS(
        weights if frozen else [*weights, features],
        max_iter=3000,
        history_size=30,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def outputs() -> Tensor:
        return functools.reduce(lambda found, weight: weight @ found, weights, features)

    def loss() -> Tensor:
        sizes = [rate / 2 * weight.square().sum() for rate, weight in zip(weight_decays, weights, strict=True)]
        fit = (outputs() - truth).square().sum() / (2 * len(labels))
        return fit + torch.stack(sizes).sum() + feature_decay / 2 * features.square().sum()

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    optimizer.step(closure)
    with torch.no_grad():
        found = outputs()
        own = torch.stack([found[c, labels == c].mean() for c in range(len(counts))])
        means = torch.stack([features[:, labels == c].mean(1) for c in range(len(counts))])
        return FreeFeatures(float(loss()), own, means)


class DeepHead(nn.Module):
    """A ReLU perceptron 64-128-128 with three linear layers and no biases in these."""

    def __init__(self, classes: int, draw: torch.Generator) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.first, self.second = nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)
        self.last = nn.Linear(128, classes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                gain = 1.0 if module.bias is None else 2**0.5
                nn.init.normal_(module.weight, std=gain / module.in_features**0.5, generator=draw)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(self.body(x))))


def trained(
    ctx: Ctx, model: DeepHead, x: Tensor, y: Tensor, *, epochs: int, decay: float
) -> Iterator[tuple[int, float]]:
    """Train in place on squared errors by Adam, decay in the gradient, and a cosine of the rate.

    Yields:
        The epoch and the training accuracy after it.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    truth = F.one_hot(y, model.last.out_features).float()
    draw = ctx.generator("batches")
    for epoch in range(1, epochs + 1):
        for index in torch.randperm(len(x), generator=draw).split(64):
            optimizer.zero_grad()
            (0.5 * (model(x[index]) - truth[index]).square().sum(1).mean()).backward()
            optimizer.step()
        schedule.step()
        ctx.progress(epoch, epochs, f"epoch {epoch}")
        yield epoch, float((predict(model, x).argmax(1) == y).double().mean())


def imbalanced(y: Tensor, *, most: int, least: int) -> Tensor:
    """Return places of samples: the classes' numbers fall in equal ratios from the most to the least."""
    classes = int(y.max()) + 1
    sizes = [round(most * (least / most) ** (c / (classes - 1))) for c in range(classes)]
    return torch.cat([(y == c).nonzero().squeeze(1)[:size] for c, size in enumerate(sizes)])
