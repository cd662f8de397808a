"""The networks and the measurements of ASLP's claim."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from nervure.compress import supermask
from nervure.compress.scaled_masks import Scaled
from nervure.core import forward, rng
from nervure.spec import Ctx, Data

GOAL, EVERY = 0.75, 25
_SURE = 100.0  # log-odds so large that train mode samples the frozen topology


def lenet(data: Data) -> nn.Sequential:
    """Return 784-300-100 with ReLU."""
    sizes = (data.train_x[0].numel(), 300, 100, data.classes)
    layers = [nn.Linear(sizes[i], sizes[i + 1]) for i in range(3)]
    return nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def conv4(data: Data, width: int = 16) -> nn.Sequential:
    """Return Conv4 with a quarter of its channels, on images of half the size."""
    ends = (data.train_x.shape[1], width, width, 2 * width, 2 * width)
    convs = [nn.Conv2d(ends[i], ends[i + 1], 3, padding=1) for i in range(4)]
    pool, side = nn.MaxPool2d(2), data.train_x.shape[-1] // 8
    head = [nn.Linear(2 * width * side**2, 4 * width), nn.ReLU(), nn.Linear(4 * width, 4 * width), nn.ReLU()]
    body = [nn.AvgPool2d(2), convs[0], nn.ReLU(), convs[1], nn.ReLU(), pool]
    body += [convs[2], nn.ReLU(), convs[3], nn.ReLU(), pool]
    return nn.Sequential(*body, nn.Flatten(), *head, nn.Linear(4 * width, data.classes))


class Reached:
    """Note, as a hook, the first step at which the frozen topology reaches the goal on a probe."""

    def __init__(self, ctx: Ctx, model: nn.Module, data: Data) -> None:
        self.ctx, self.model, self.probe = ctx, model, (data.validation_x, data.validation_y)
        self.step: int | None = None

    def after_step(self, step: int) -> None:
        """Measure now and then until the goal is reached."""
        if self.step is None and step % EVERY == 0 and self.ctx.accuracy(self.model, *self.probe) >= GOAL:
            self.step = step


def he_start(build: Callable[[Data], nn.Sequential], data: Data, ctx: Ctx) -> nn.Sequential:
    """Draw a network's weights by He's rule; the same for every arm of a seed."""
    with rng.scope("aslp", ctx.seed_for("weights")):
        model = build(data)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return model


def sampled_accuracy(model: nn.Module, data: Data, draws: int = 5) -> float:
    """Return the mean accuracy of sampled topologies; these networks have nothing else that train mode changes."""
    with forward.mode(model, train=True), torch.no_grad():
        return sum(float((model(data.test_x).argmax(-1) == data.test_y).double().mean()) for _ in range(draws)) / draws


@torch.no_grad()
def shuffle_(model: nn.Module, draw: torch.Generator) -> nn.Module:
    """Permute the frozen topology of every layer; all that may then be trained is scales."""
    for _, mask, scores in supermask.on(model):
        kept = scores.flatten()[torch.randperm(scores.numel(), generator=draw)].view_as(scores)
        scores.copy_(torch.where(kept >= 0, _SURE, -_SURE))
        if isinstance(mask, Scaled):
            mask.scale.fill_(1)
    return model
