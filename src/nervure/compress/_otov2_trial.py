"""What OTOv2's claim trains: two networks of small images, and a group lasso to compare with."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nervure.compress.claim_task import ClaimTask
from nervure.compress.zero_groups import ZeroGroups
from nervure.core import forward
from nervure.core.channels import ChannelGraph
from nervure.data import Splits
from nervure.spec import Ctx, Data

if TYPE_CHECKING:
    from nervure.compress.otov2 import DHSPG

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)
SHARES = (0.5, 0.75)


class DenseNet(nn.Module):
    """Concatenate every layer's output to its input, with BatchNorm before each convolution.

    Args:
        width: Channels of the stem and growth of every layer.
        depth: Layers before and after the pooling.
        classes: Number of outputs.
    """

    def __init__(self, width: int = 8, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False)
        ends = range(width, (2 * depth + 2) * width, width)
        self.norms = nn.ModuleList(nn.BatchNorm2d(end) for end in ends)
        self.convs = nn.ModuleList(nn.Conv2d(end, width, 3, padding=1, bias=False) for end in ends[:-1])
        self.head = nn.Linear(ends[-1], classes)
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, conv in enumerate(self.convs):
            if index == self.depth:
                x = F.avg_pool2d(x, 2)
            x = torch.cat([x, conv(F.relu(self.norms[index](x)))], 1)
        return self.head(F.relu(self.norms[-1](x)).mean((2, 3)))


def halved(data: Data) -> Splits:
    """Return the data with images of half the height and width."""
    train, validation, test = (F.avg_pool2d(x, 2) for x in (data.train_x, data.validation_x, data.test_x))
    return Splits(data.name, data.classes, train, data.train_y, validation, data.validation_y, test, data.test_y)


class _Shrink:
    """Take the proximal step of the group lasso, strength * sqrt(entries) * norm, after every optimizer step."""

    def __init__(self, groups: ZeroGroups, strength: float, *, rate: float) -> None:
        self.groups, self.threshold = groups, rate * strength * groups.entries.sqrt()

    def after_step(self, step: int) -> None:
        weights = [one.detach() for one in self.groups.parameters]
        norm = self.groups.dots(weights, weights).sqrt().clamp_min(1e-300)
        self.groups.add_(weights, -(self.threshold / norm).clamp_max(1))


def outcomes(
    ctx: Ctx, model: nn.Module, data: Data, arms: Mapping[str, type[DHSPG]], *, steps: int
) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Train all arms from one model's weights and measure what comes out.

    Yields:
        Arm, share of the groups to go, metric -> value.
    """
    graph = ChannelGraph.of(model, data.train_x[:2])
    total = len(ZeroGroups.of(model, graph))
    plain = ctx.train(copy.deepcopy(model), data, steps=steps)
    lassos = [copy.deepcopy(model) for _ in STRENGTHS]
    for strength, net in zip(STRENGTHS, lassos, strict=True):
        shrink = _Shrink(ZeroGroups.of(net, graph), strength, rate=1.2e-3)
        ctx.train(net, data, steps=steps, hooks=[shrink])
    for share in SHARES:
        count = round(share * total)
        for arm, kind in arms.items():
            yield arm, share, _trained(ctx, copy.deepcopy(model), data, graph, kind, count, steps)
        yield "one-shot", share, _accuracy(ctx, _smallest_cut(plain, graph, count), data)
        cut = [_smallest_cut(net, graph, count) for net in lassos]
        best = max(cut, key=lambda net: ctx.accuracy(net, data.validation_x, data.validation_y))
        yield "group lasso", share, _accuracy(ctx, best, data)


def _trained(
    ctx: Ctx, net: nn.Module, data: Data, graph: ChannelGraph, kind: type[DHSPG], count: int, steps: int
) -> dict[str, float]:
    groups = ZeroGroups.of(net, graph)
    made: list[DHSPG] = []

    def wrap(model: nn.Module, base: torch.optim.Optimizer) -> DHSPG:
        made.append(kind(base, groups, target=count, warmup=steps // 4, steps=steps // 2))
        return made[-1]

    ClaimTask(ctx, data).train(net, steps=steps, optimizer=wrap)
    weights = [one.detach() for one in groups.parameters]
    zeros = int((groups.dots(weights, weights) == 0).sum())
    cut = graph.cut(net, groups.keep(made[-1].chosen))
    before, after = (forward.predict(one, data.test_x) for one in (net, cut))
    difference = float((before - after).abs().max())
    return {**_accuracy(ctx, cut, data), "missing": abs(zeros - count), "difference": difference}


def _smallest_cut(net: nn.Module, graph: ChannelGraph, count: int) -> nn.Module:
    groups = ZeroGroups.of(net, graph)
    return graph.cut(net, groups.keep(groups.lowest(groups.relative_sizes(), count)))


def _accuracy(ctx: Ctx, net: nn.Module, data: Data) -> dict[str, float]:
    return {"accuracy": ctx.accuracy(net, data.test_x, data.test_y)}
