"""Signed supermasks: random weights stay as they are, and each is kept, hidden or inverted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nervure._kit import BadData, UsageError
from nervure.compress import supermask
from nervure.compress.claim_task import ClaimTask
from nervure.core import rng
from nervure.core.bitpack import pack, unpack
from nervure.core.cost import bytes_on_disk
from nervure.spec import Card, Check, Ctx, claim

CARD = Card(
    id="signed-supermask",
    n=137,
    title="Signing the Supermask: Keep, Hide, Invert",
    year=2022,
    link="https://openreview.net/forum?id=e0jtGTfPihs",
    family="compress",
    summary=(
        "Freeze random weights of one magnitude a layer and learn for each whether to keep it, hide it or invert its "
        "sign, by a score with a dead zone and a straight-through gradient. Nothing else is trained; the result is a "
        "ternary network that needs one scale a layer and two bits a weight."
    ),
    tags=("supermask", "ternary weights", "straight-through estimator", "frozen weights", "compression"),
    provides=("signed_supermask_", "pack_ternary", "unpack_ternary"),
    claims=("signs_help",),
    needs=("data", "labels", "grad"),
    deviations=(
        "Weights are signs times sqrt(1 / (0.645 fan-in)), which keeps the variance of activations under ELU; scores "
        "start uniform within sqrt(3) of that.",
        "Norms are plain: neither scale nor shift is trained.",
        "Learning rates and weight decay of the claim were chosen on validation images of a seed outside the claim.",
    ),
    verified=(
        "The forward pass equals that of a plain network with the ternary weights, bit for bit.",
        "The scores' gradient is that of the weight times the frozen weight.",
        "The 0.645 equals the second moment of ELU under a standard normal by quadrature.",
    ),
    tunes={"tau": (0.0, 0.1)},
)


class _Ternary(torch.autograd.Function):
    """Return +1 above tau, -1 below -tau, else 0; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, tau: float) -> Tensor:
        return (scores > tau).to(scores.dtype) - (scores < -tau).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        return outer[0], None


class _Signed(supermask.Mask):
    def __init__(self, frozen: Tensor, scores: Tensor, tau: float) -> None:
        super().__init__(frozen, scores)
        self.tau = tau

    def mask(self, scores: Tensor) -> Tensor:
        found: Tensor = _Ternary.apply(scores, self.tau)
        return found


class _Positive(_Ternary):
    """Return 1 above tau, else 0."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, tau: float) -> Tensor:
        return (scores > tau).to(scores.dtype)


class _Unsigned(_Signed):
    def mask(self, scores: Tensor) -> Tensor:
        found: Tensor = _Positive.apply(scores, self.tau)
        return found


def signed_supermask_(model: nn.Module, *, tau: float = 0.01, seed: int = 0) -> nn.Module:
    """Freeze a model in place at random signs and learn which to keep, hide and invert.

    A layer's weight becomes sigma s e, with s random signs, sigma one number a layer and e = +1 where the score is
    above tau, -1 below -tau, else 0; the score's gradient is the weight's times sigma s. Train the parameters that
    are left (the scores) with SGD and weight decay, which moves scores into the dead zone. ELU is the activation
    the scale is made for. ``supermask.freeze_`` makes an ordinary ternary network of it.

    Args:
        model: A network whose weights belong to linear and convolution layers.
        tau: Half width of the dead zone, at least 0.
        seed: Draws signs and scores.

    Returns:
        The same model.

    Raises:
        UsageError: If tau is negative.

    Examples:
        >>> net = signed_supermask_(nn.Sequential(nn.Linear(8, 16), nn.ELU(), nn.Linear(16, 3)))
        >>> sorted(set((net[0].weight / net[0].weight.abs().max() + 0).flatten().tolist()))
        [-1.0, 0.0, 1.0]
        >>> [name for name, p in net.named_parameters() if p.requires_grad]
        ['0.parametrizations.weight.original', '2.parametrizations.weight.original']
    """
    return _put_on(model, _Signed, tau, seed)


def _put_on(model: nn.Module, kind: type[_Signed], tau: float, seed: int) -> nn.Module:
    if tau < 0:
        raise UsageError("the dead zone has no negative width", expected="tau >= 0", found=tau)

    def make(weight: Tensor, name: str) -> supermask.Mask:
        frozen = supermask.signed_constants(weight, gain="elu", seed=seed, name=name)
        bound = math.sqrt(3) * float(frozen.abs().flatten()[0])
        draw = torch.rand(weight.shape, generator=rng.generator("scores", seed, name)) * 2 - 1
        return kind(frozen, (draw * bound).to(weight.device, weight.dtype), tau)

    return supermask.put_on_(model, make, method="signed_supermask_")


def pack_ternary(weight: Tensor) -> tuple[Tensor, float]:
    """Pack a weight of values -s, 0 and s into two bits each.

    Args:
        weight: The weight.

    Returns:
        Bytes and s.

    Raises:
        BadData: If the weight has another magnitude.

    Examples:
        >>> packed, scale = pack_ternary(torch.tensor([[0.5, 0.0], [-0.5, 0.5]]))
        >>> unpack_ternary(packed, scale, shape=(2, 2)).tolist()
        [[0.5, 0.0], [-0.5, 0.5]]
    """
    sizes = weight.detach().abs()
    scale = float(sizes.max()) if weight.numel() else 0.0
    if not bool(((sizes == 0) | (sizes == scale)).all()):
        raise BadData("the weight is not ternary", expected="values -s, 0 and s")
    return pack(weight.detach().sign().to(torch.int64) + 1, bits=2), scale


def unpack_ternary(packed: Tensor, scale: float, *, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack_ternary`.

    Args:
        packed: Bytes.
        scale: The magnitude.
        shape: Shape of the weight.

    Returns:
        The weight, in single precision.
    """
    return (unpack(packed, bits=2, shape=shape).float() - 1) * scale


_RATES = (0.03, 0.1, 0.3)


@claim(
    CARD,
    checks=(
        Check(name="signed above unsigned", method="signed", control="unsigned", metric="accuracy", margin=0.01),
        Check(name="far above a random mask", method="signed", control="random mask", metric="accuracy", margin=0.3),
        Check.at_most("a random mask is near chance", method="random mask", metric="accuracy", bound=0.3),
    ),
    sabotage={"random mask": "signed"},
    seeds=5,
    minutes=4,
    data=("fashion-mnist",),
)
def signs_help(ctx: Ctx) -> None:
    """With frozen random weights, learning to keep, hide or invert is a point better than learning to keep or hide.

    Fashion-MNIST, 784-300-100-10 with ELU, 1,000 steps of SGD with momentum 0.9 and weight decay 5e-4 on the scores,
    each arm with the best of three learning rates by validation accuracy. Sparsity and the bytes of the packed
    network are reported beside a trained dense network; the sabotage draws the same number of each sign by chance.
    """
    data = ctx.data("fashion-mnist", validation=2000)
    steps = ctx.scaled(1000, 100)
    ctx.plan(7 * steps)

    def network() -> nn.Sequential:
        sizes = (data.train_x[0].numel(), 300, 100, data.classes)
        with rng.scope("supermask", ctx.seed):
            layers = [nn.Linear(sizes[i], sizes[i + 1]) for i in range(3)]
        return nn.Sequential(nn.Flatten(), layers[0], nn.ELU(), layers[1], nn.ELU(), layers[2])

    def run(kind: type[_Signed], rate: float) -> tuple[nn.Module, float]:
        model = _put_on(network(), kind, 0.01, ctx.seed_for("masks"))

        def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=5e-4)

        ClaimTask(ctx, data, optimizer=optimizer).train(model, steps=steps)
        return model, ctx.accuracy(model, data.validation_x, data.validation_y)

    for arm, kind in (("signed", _Signed), ("unsigned", _Unsigned)):
        best = max((run(kind, rate) for rate in _RATES), key=lambda pair: pair[1])[0]
        _measure(ctx, arm, best, data)
        if arm == "signed":
            _measure(ctx, "random mask", _shuffled(best, ctx.generator("shuffle")), data)
    dense = network()
    ctx.train(dense, data, steps=steps)
    ctx.measure("dense", accuracy=ctx.accuracy(dense, data.test_x, data.test_y), bytes=bytes_on_disk(dense))


def _measure(ctx: Ctx, arm: str, model: nn.Module, data: Any) -> None:
    packed = [pack_ternary(mask(scores))[0].numel() + 4 for _, mask, scores in supermask.on(model)]
    ctx.measure(
        arm,
        accuracy=ctx.accuracy(model, data.test_x, data.test_y),
        density=supermask.density(model),
        bytes=sum(packed),
    )


@torch.no_grad()
def _shuffled(model: nn.Module, draw: torch.Generator) -> nn.Module:
    for _, _, scores in supermask.on(model):
        scores.copy_(scores.flatten()[torch.randperm(scores.numel(), generator=draw)].view_as(scores))
    return model
