"""ASLP: find a good sub-network of an untrained network by training the log-odds of keeping each weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nervure._kit import NoEffect, UsageError
from nervure.compress import supermask
from nervure.compress._aslp_trial import Reached, conv4, he_start, lenet, sampled_accuracy, shuffle_
from nervure.compress.scaled_masks import Ranked, Sampled, Scaled
from nervure.core import rng
from nervure.spec import Card, Check, Ctx, Data, claim

CARD = Card(
    id="aslp-gumbel-subnetworks",
    n=285,
    title="Extracting Effective Subnetworks with Gumbel-Softmax",
    year=2022,
    link="https://arxiv.org/abs/2202.12986",
    family="compress",
    summary=(
        "Leave the random weights of a network as they are and learn which to keep: every step samples a topology by "
        "straight-through Gumbel-softmax from one learnt number a weight, its log-odds, and one learnt scale a layer "
        "makes up for the signal that masking takes away. At the end the more probable choice is frozen."
    ),
    tags=("supermask", "Gumbel-softmax", "straight-through estimator", "strong lottery ticket", "frozen weights"),
    provides=("aslp_", "stochastic_supermask_", "edge_popup_", "parameter_groups", "expected_density"),
    claims=("topology_is_learnt",),
    needs=("data", "labels", "grad"),
    deviations=(
        "The difference of two Gumbel numbers is drawn at once, as a logistic number: the same distribution and "
        "gradient as sampling the pair.",
        "Biases are zero and norms plain; neither is trained.",
    ),
    verified=(
        "With the same noise samples and gradients equal torch.nn.functional.gumbel_softmax's on the pair of "
        "log-probabilities, shifted by any constant.",
        "Frequencies of 20,000 samples agree with the exact probabilities by a chi-square test.",
        "The frozen network equals a plain network with the thresholded weights, bit for bit.",
    ),
    tunes={"temperature": (0.3, 3.0)},
)


def aslp_(
    model: nn.Module,
    *,
    temperature: float = 1.0,
    rescale: bool = True,
    weights: Literal["kept", "signs"] = "kept",
    seed: int = 0,
) -> nn.Module:
    """Freeze a model in place at its random weights and learn which of them to keep.

    A layer's weight becomes s w m with w frozen, s one learnt scale and m sampled anew at every forward in train
    mode: m = 1 where a + g1 - g0 >= 0, with a the learnt log-odds, which start at 0, and g Gumbel noise; the
    gradient is that of sigmoid((a + g1 - g0) / temperature). Log-odds are log-probabilities up to a shift, which
    Gumbel-softmax does not see, so nothing saturates. In eval mode m = 1 where a >= 0, and `supermask.freeze_` makes
    an ordinary network of it. `parameter_groups` gives an optimizer what to train; start from weights with He's
    variance. Reading a weight in train mode is a draw.

    Args:
        model: A network whose weights belong to linear and convolution layers.
        temperature: Of the softmax, above 0.
        rescale: Whether the layers' scales are learnt.
        weights: ``"kept"`` leaves the random weights as they are, ``"signs"`` leaves their signs times the layer's
            standard deviation.
        seed: Draws the topologies.

    Returns:
        The same model.

    Raises:
        UsageError: If the temperature is not positive.

    Examples:
        >>> net = aslp_(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
        >>> bool((net[0].weight == net[0].weight).all())  # two draws
        False
        >>> optimizer = torch.optim.SGD(parameter_groups(net), momentum=0.9)
        >>> nn.functional.cross_entropy(net(torch.randn(4, 8)), torch.tensor([0, 1, 2, 0])).backward()
        >>> optimizer.step()
        >>> plain = supermask.freeze_(net)
        >>> bool((plain[0].weight == 0).any())
        True
    """
    return _sampled(model, "gumbel", temperature, rescale, weights, seed)


def stochastic_supermask_(
    model: nn.Module,
    *,
    temperature: float = 1.0,
    rescale: bool = True,
    weights: Literal["kept", "signs"] = "kept",
    seed: int = 0,
) -> nn.Module:
    """Do as `aslp_` with m a Bernoulli sample of sigmoid(a / temperature) and the sigmoid's gradient: the control.

    Args:
        model: As in `aslp_`.
        temperature: Above 0.
        rescale: As in `aslp_`.
        weights: As in `aslp_`.
        seed: As in `aslp_`.

    Returns:
        The same model.
    """
    return _sampled(model, "bernoulli", temperature, rescale, weights, seed)


def _sampled(
    model: nn.Module, rule: Literal["gumbel", "bernoulli"], tau: float, rescale: bool, weights: str, seed: int
) -> nn.Module:
    if tau <= 0:
        raise UsageError("there is no such temperature", expected="above 0", found=tau)

    def make(weight: Tensor, name: str) -> supermask.Mask:
        frozen = _frozen(weight, weights)
        return Sampled(frozen, rule=rule, temperature=tau, rescale=rescale, seed=rng.seed_for(seed, name))

    return supermask.put_on_(model, make, method="aslp_")


def edge_popup_(
    model: nn.Module,
    *,
    density: float = 0.5,
    rescale: bool = True,
    weights: Literal["kept", "signs"] = "kept",
    seed: int = 0,
) -> nn.Module:
    """Freeze a model in place and learn scores whose largest magnitudes in each layer are the weights kept.

    Args:
        model: As in `aslp_`.
        density: Share of each layer's weights that is kept, in (0, 1].
        rescale: As in `aslp_`.
        weights: As in `aslp_`.
        seed: Draws the first scores, uniform within 1 / sqrt(fan-in).

    Returns:
        The same model.

    Raises:
        UsageError: If the density is outside its range.
    """
    if not 0 < density <= 1:
        raise UsageError("there is no such density", expected="above 0, at most 1", found=density)

    def make(weight: Tensor, name: str) -> supermask.Mask:
        draw = torch.rand(weight.shape, generator=rng.generator("edge-popup", seed, name)) * 2 - 1
        scores = (draw / max(1, weight[0].numel()) ** 0.5).to(weight.device, weight.dtype)
        return Ranked(_frozen(weight, weights), scores, density=density, rescale=rescale)

    return supermask.put_on_(model, make, method="edge_popup_")


def _frozen(weight: Tensor, kind: str) -> Tensor:
    return weight.sign() * weight.std() if kind == "signs" else weight.clone()


def parameter_groups(model: nn.Module, *, lr: float = 50.0, scale_lr: float = 1e-3) -> list[dict[str, Any]]:
    """Return an optimizer's groups: log-odds need a far larger learning rate than scales under plain SGD.

    Args:
        model: What `aslp_`, `stochastic_supermask_` or `edge_popup_` returned.
        lr: Learning rate of the log-odds; 50 in the paper's code, with batches of 256 and momentum 0.9.
        scale_lr: That of the layers' scales.

    Returns:
        One group, or two where scales are learnt.

    Raises:
        NoEffect: If the model carries no mask.
    """
    found = list(supermask.on(model))
    if not found:
        raise NoEffect("the model carries no mask", try_="aslp_(model) first")
    scales = [mask.scale for _, mask, _ in found if isinstance(mask, Scaled) and mask.scale.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [scores for _, _, scores in found], "lr": lr}]
    return [*groups, {"params": scales, "lr": scale_lr}] if scales else groups


def expected_density(model: nn.Module) -> Tensor:
    """Return the expected share of weights kept, with its gradient: times a strength, a penalty on density.

    Args:
        model: What `aslp_` returned.

    Returns:
        A scalar in [0, 1].

    Raises:
        NoEffect: If the model carries no mask.
    """
    odds = [scores.flatten() for _, _, scores in supermask.on(model)]
    if not odds:
        raise NoEffect("the model carries no mask", try_="aslp_(model) first")
    return torch.cat(odds).sigmoid().mean()


# Learning rates by network, chosen on a seed of their own; log-odds share one, scores of edge-popup have another scale.
_NETWORKS = {"mlp": (lenet, 1000, 800.0), "conv": (conv4, 600, 200.0)}
_EDGE_RATE, _SCALE_RATE = 0.1, 0.1
_ARMS: dict[str, Callable[..., nn.Module]] = {
    "aslp": aslp_,
    "no rescale": lambda model, seed: aslp_(model, rescale=False, seed=seed),
    "sigmoid": stochastic_supermask_,
    "edge-popup": edge_popup_,
}


def _margins(network: str) -> tuple[Check, ...]:
    return (
        Check.at_least(
            f"rescaling gains two points or halves the steps, {network}",
            method="aslp",
            metric=f"{network}_rescale_gain",
            bound=1.0,
        ),
        Check(
            name=f"as good as the sigmoid within 0.3 points, {network}",
            method="aslp",
            control="sigmoid",
            metric=f"{network}_accuracy",
            margin=-0.003,
        ),
        Check(
            name=f"the frozen topology is as good as sampled ones within 0.3 points, {network}",
            method="aslp",
            control="sampled",
            metric=f"{network}_accuracy",
            margin=-0.003,
        ),
        Check.at_most(
            f"a random mask stays below 40%, {network}", method="random mask", metric=f"{network}_accuracy", bound=0.4
        ),
    )


@claim(
    CARD,
    checks=(*_margins("mlp"), *_margins("conv")),
    sabotage={"random mask": "aslp"},
    seeds=5,
    minutes=6,
    data=("fashion-mnist",),
)
def topology_is_learnt(ctx: Ctx) -> None:
    """Frozen random weights under a learnt topology classify well, with smart rescale better or twice as fast.

    ASLP trains as well as the sigmoid, and the frozen topology is as good as sampled ones. Fashion-MNIST, SGD with
    momentum 0.9, batch 64: 784-300-100 for 1,000 steps and, on images of half the size, Conv4 with a quarter of its
    channels for 600. The gain of rescaling is the larger of points / 2 and the binary logarithm of the ratio of steps
    to 75%, an arm that never gets there counting as its last step. The sabotage permutes each layer's learnt topology
    and learns the layers' scales alone.
    """
    data = ctx.data("fashion-mnist", validation=1000)
    full = {name: ctx.scaled(steps, steps // 10) for name, (_, steps, _) in _NETWORKS.items()}
    ctx.plan((len(_ARMS) + 1) * sum(full.values()))
    for network, (build, _, rate) in _NETWORKS.items():
        steps, found, reached = full[network], {}, {}
        for arm, put_on_ in _ARMS.items():
            model = put_on_(he_start(build, data, ctx), seed=ctx.seed_for("topology"))
            hook = Reached(ctx, model, data)
            _train(ctx, model, data, steps, lr=_EDGE_RATE if arm == "edge-popup" else rate, hooks=[hook])
            found[arm], reached[arm] = ctx.accuracy(model, data.test_x, data.test_y), hook.step or steps
            ctx.measure(arm, **{f"{network}_accuracy": found[arm], f"{network}_density": supermask.density(model)})
            ctx.measure(arm, **{f"{network}_steps_to_75": reached[arm]})
            if arm == "aslp":
                ctx.measure("sampled", **{f"{network}_accuracy": sampled_accuracy(model, data)})
                shuffled = shuffle_(model, ctx.generator("shuffle", network))
                _train(ctx, shuffled, data, steps, lr=0.0)
                ctx.measure("random mask", **{f"{network}_accuracy": ctx.accuracy(shuffled, data.test_x, data.test_y)})
        points = (found["aslp"] - found["no rescale"]) / 0.02
        gain = max(points, math.log2(reached["no rescale"] / reached["aslp"]))
        ctx.measure("aslp", **{f"{network}_rescale_gain": gain})


def _train(ctx: Ctx, model: nn.Module, data: Data, steps: int, *, lr: float, hooks: Iterable[object] = ()) -> None:
    groups = parameter_groups(model, lr=lr, scale_lr=_SCALE_RATE)
    ctx.train(model, data, steps=steps, hooks=hooks, optimizer=lambda _: torch.optim.SGD(groups, momentum=0.9))
