"""Random networks: whatever the graph calls exact must be exact, and every group must be cuttable."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nervure.core.channels import ChannelGraph, Group

WIDTH = 8
UNARY = (torch.relu, torch.sigmoid, F.gelu, torch.tanh, lambda x: x + 1, lambda x: x * 2 - 0.0, torch.exp, F.softplus)


class Step(nn.Module):
    """One randomly chosen step from two maps of WIDTH channels to one."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.kind = draw.choice(
            ("conv", "grouped", "depthwise", "wide", "norm", "group-norm", "unary", "add", "mul", "cat", "chunk",
             "gate", "shuffle", "scale", "mean", "attend", "heads", "einsum", "linear", "split", "shift", "normalise")
        )  # fmt: skip
        groups = {"grouped": 4, "depthwise": WIDTH}.get(self.kind, 1)
        inner = {"wide": 6, "cat": 2 * WIDTH}.get(self.kind, WIDTH)
        before, after = (inner, WIDTH) if self.kind == "cat" else (WIDTH, inner)
        self.conv = nn.Conv2d(before, after, 3, padding=1, groups=groups)
        self.back = nn.Conv2d(6, WIDTH, 1)
        self.norm, self.groups = nn.BatchNorm2d(WIDTH), nn.GroupNorm(draw.choice((1, 2, 4)), WIDTH)
        self.unary = draw.choice(UNARY)
        self.scale = nn.Parameter(torch.randn(WIDTH, 1, 1))
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.heads, self.head = 2, WIDTH // 2

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        match self.kind:
            case "conv" | "grouped" | "depthwise":
                return self.conv(x)
            case "wide":
                return self.back(F.relu(self.conv(x)))
            case "norm":
                return self.norm(x)
            case "group-norm":
                return self.groups(x)
            case "unary":
                return self.unary(x)
            case "add":
                return x + y
            case "mul":
                return x * y
            case "cat":
                return self.conv(torch.cat([x, y], 1))
            case "chunk":
                left, right = x.chunk(2, 1)
                return torch.cat([right, left * 2], 1)
            case "gate":
                return x * torch.sigmoid(self.conv(y))
            case "shuffle":
                return F.channel_shuffle(x, 2)
            case "scale":
                return x * self.scale
            case "mean":
                return x - x.mean(1, keepdim=True)
            case "attend":
                flat = x.flatten(2)
                return (torch.softmax(flat.mT @ y.flatten(2), -1) @ flat.mT).mT.reshape(x.shape)
            case "heads":
                split = x.flatten(2).transpose(1, 2).unflatten(2, (self.heads, self.head)).transpose(1, 2)
                mixed = F.scaled_dot_product_attention(split, split, split, scale=0.5)
                return mixed.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])
            case "einsum":
                return torch.einsum("bchw,cd->bdhw", x, self.matrix)
            case "linear":
                return self.linear(x.movedim(1, -1)).movedim(-1, 1)
            case "split":
                return torch.cat(x.split([3, 5], 1), 1)
            case "shift":
                return torch.cat([x[:, 2:], y[:, :2]], 1)
            case _:
                return F.normalize(x, dim=1)


class Network(nn.Module):
    def __init__(self, seed: int, steps: int = 6) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.stems = nn.ModuleList(nn.Conv2d(2, WIDTH, 1) for _ in range(2))
        self.steps = nn.ModuleList(Step(draw) for _ in range(steps))
        self.sources = [(draw.randrange(2 + index), 1 + index) for index in range(steps)]
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = [stem(x) for stem in self.stems]
        for step, (one, other) in zip(self.steps, self.sources, strict=True):
            maps.append(step(maps[other], maps[one]))
        return self.head(maps[-1].mean((2, 3)))


@pytest.mark.parametrize("seed", range(40))
def test_random_network(seed):
    torch.manual_seed(seed)
    model, x = Network(seed).double().eval(), torch.randn(2, 2, 3, 3, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    graph = ChannelGraph.of(model, x)
    with torch.no_grad():
        scale = model(x).abs().max()
        for group in graph.groups:
            keep = {group.id: [one for one in range(group.size) if one != group.size // 2]}
            cut, masked = graph.cut(model, keep)(x), graph.mask(model, keep)(x)
            if group.exact:
                assert (cut - masked).abs().max() <= 1e-9 * scale, (group.name, [step.kind for step in model.steps])
            if group.zero_invariant:
                zeroed = _without_producers(model, group)
                assert (cut - zeroed(x)).abs().max() <= 1e-9 * scale, group.name
        together = {group.id: range(max(1, group.size - 2)) for group in graph.groups if group.exact}
        cut, masked = graph.cut(model, together)(x), graph.mask(model, together)(x)
        assert (cut - masked).abs().max() <= 1e-9 * scale
    graph.cut(model, {group.id: [0] for group in graph.groups})


def _without_producers(model: nn.Module, group: Group) -> nn.Module:
    zeroed = copy.deepcopy(model)
    held = {**dict(zeroed.named_parameters()), **dict(zeroed.named_buffers())}
    for one in group.producers:
        held[one.parameter].index_fill_(one.axis, one.index(group.size // 2), 0)
    return zeroed
