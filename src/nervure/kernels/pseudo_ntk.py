"""The pseudo-NTK: one N x N kernel of the summed logits in place of the NO x NO empirical NTK."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nervure._kit import UsageError
from nervure.core.jacobian import Engine
from nervure.core.layerwise import LayerwiseGram, gram_of
from nervure.core.rng import generator
from nervure.kernels.torchntk import entk
from nervure.spec import Card, Check, Ctx, claim

CARD = Card(
    id="pseudo-ntk",
    n=126,
    title="A Fast, Well-Founded Approximation to the Empirical Neural Tangent Kernel",
    year=2022,
    link="https://arxiv.org/abs/2206.12543",
    family="kernels",
    summary=(
        "The NTK of the sum of the outputs divided by sqrt(O) stands in for the kernel between all pairs of outputs; "
        "with a wide linear readout at initialisation the relative error falls like width^(-1/2)."
    ),
    tags=("neural tangent kernel", "pNTK", "approximation", "kernel regression"),
    provides=("pntk", "pntk_error", "PntkError"),
    protocol="kernel",
    claims=("error_falls_with_width", "predicts_like_the_full_kernel"),
    needs=("grad",),
    deviations=(
        "The error estimate from a few output pairs is ours; the paper compares with the full kernel.",
        "The CNN of the claim has 8 to 256 channels: the full kernel of 1024 would need tens of gigabytes.",
    ),
    verified=(
        "Equal to the contraction of the full kernel of torch.func with 1/sqrt(O) vectors to 1e-12 in float64.",
        "The estimated error equals the exact relative Frobenius error when all output pairs are taken.",
    ),
)


def pntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    layers: Iterable[str] | None = None,
    block: int | None = None,
) -> LayerwiseGram:
    """Compute the pseudo-NTK, the kernel of the function sum_o f_o / sqrt(O).

    The empirical NTK of all outputs is approximated by pNTK times the identity over outputs. The theorem asks for a
    wide linear readout at initialisation; `pntk_error` measures how far off it is for a model at hand.

    Args:
        model: The model, in the mode it is in; batch normalisation must be in eval mode.
        x1: Inputs of N samples.
        x2: Inputs of M samples; None takes `x1`.
        layers: Parameter names or prefixes; None takes all that require a gradient.
        block: Samples held at once, at least 1; None holds all.

    Returns:
        The kernel, shape (N, M), as a sum over parameters.

    Examples:
        >>> pntk(nn.Linear(3, 10), torch.randn(4, 3)).full.shape
        torch.Size([4, 4])
    """
    return entk(model, x1, x2, outputs="sum_logits", layers=layers, block=block)


@dataclass(frozen=True)
class PntkError:
    """Say how far the pseudo-NTK is from the empirical NTK of this model on these samples.

    Args:
        relative: Estimated relative Frobenius error |K - pNTK x I| / |K|.
        diagonal: The part from equal outputs, relative to |K|.
        off_diagonal: The part from different outputs, relative to |K|.
        pairs: How many pairs of outputs the estimate rests on.
        exact: Whether these were all pairs.
    """

    relative: float
    diagonal: float
    off_diagonal: float
    pairs: int
    exact: bool


def pntk_error(model: nn.Module, x: Any, *, outputs_drawn: int = 8, seed: int = 0) -> PntkError:
    """Estimate the relative Frobenius error of the pseudo-NTK from randomly drawn outputs.

    The squared error splits into O blocks of equal outputs, |K_oo - P|^2, and O (O - 1) blocks of different ones,
    |K_op|^2. Each mean is estimated over the pairs of the outputs drawn; with all outputs drawn it is exact.

    Args:
        model: The model, in the mode it is in.
        x: Inputs of a few dozen samples.
        outputs_drawn: How many outputs are drawn, at least 2.
        seed: Seed of the draw.

    Returns:
        The error.

    Raises:
        UsageError: If fewer than two outputs are asked for.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> error = pntk_error(net, torch.randn(6, 3))
        >>> error.exact, 0 < error.relative < 2
        (True, True)
    """
    if outputs_drawn < 2:
        raise UsageError("one output has no pairs", expected="at least 2", found=outputs_drawn)
    engine = Engine(model, x, method="pntk_error")
    with engine.trace(x) as trace:
        output = trace.output.detach()
        count = output[0].numel()
        chosen = torch.randperm(count, generator=generator("pntk-error", seed))[:outputs_drawn].sort().values
        drawn = len(chosen)
        cotangents = output.new_zeros(drawn + 1, len(output), count)
        cotangents[torch.arange(drawn), :, chosen] = 1
        cotangents[drawn] = count**-0.5
        rows = trace.rows(cotangents.view(drawn + 1, *output.shape))
    K = gram_of(rows).double()
    pseudo, blocks = K[:, :, drawn, drawn], K[:, :, :drawn, :drawn]
    energy = blocks.square().sum((0, 1))
    equal = torch.stack([(blocks[:, :, o, o] - pseudo).square().sum() for o in range(drawn)]).mean() * count
    others = (energy.sum() - energy.diag().sum()) / max(1, drawn * (drawn - 1)) * count * (count - 1)
    whole = energy.diag().mean() * count + others
    share = [math.sqrt(float(part / whole)) if whole > 0 else math.nan for part in (equal + others, equal, others)]
    return PntkError(share[0], share[1], share[2], drawn * drawn, drawn == count)


def _relative_error(full: Tensor, pseudo: Tensor) -> float:
    outputs_ = full.shape[-1]
    difference = full.clone()
    difference.diagonal(dim1=2, dim2=3).sub_(pseudo.unsqueeze(-1).expand(*pseudo.shape, outputs_))
    return float(difference.norm() / full.norm())


def _network(width: int, source: torch.Generator, *, convolutional: bool, readout: int | None = None) -> nn.Module:
    """Build an MLP or a small CNN for 8 x 8 images, He-initialised, with a linear readout of variance 1 / width."""
    last = readout or width
    if convolutional:
        body = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 3, padding=1, stride=2), nn.ReLU()]
        body += [nn.Conv2d(width, last, 3, padding=1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    else:
        body = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, last), nn.ReLU()]
    model = nn.Sequential(*body, nn.Linear(last, 10))
    with torch.no_grad():
        for value in model.parameters():
            fan = value[0].numel() if value.ndim > 1 else 0
            gain = 1.0 if len(value) == 10 else 2.0
            draw = torch.randn(value.shape, generator=source)
            value.copy_(draw * math.sqrt(gain / fan) if fan else torch.zeros_like(value))
    return model


def _slope(widths: list[int], errors: list[float]) -> float:
    x = torch.tensor(widths, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@claim(
    CARD,
    checks=(
        Check.at_most("the MLP's error falls like width^(-1/2)", method="pntk", metric="slope_excess", bound=0.15),
        Check.at_most("the CNN's error falls like width^(-1/2)", method="pntk-cnn", metric="slope_excess", bound=0.15),
    ),
    sabotage={"unnormalised": "pntk", "narrow-readout": "pntk-cnn"},
    seeds=5,
    minutes=1.5,
    data=("digits",),
)
def error_falls_with_width(ctx: Ctx) -> None:
    """The relative Frobenius error of the pseudo-NTK at initialisation falls like width^(-1/2).

    Slopes in [-0.65, -0.35] on a log-log scale, 64 digits, 10 outputs, MLPs of width 32 to 1024 and CNNs of 8 to 256
    channels. The controls leave out
    the division by sqrt(O), and keep the readout at width 4 while the rest of the network grows.
    """
    x = ctx.data("digits", train=64).train_x[:64].flatten(1)
    widths = ctx.scaled([32, 64, 128, 256, 512, 1024], [32, 64, 128])
    errors: dict[str, list[float]] = {"pntk": [], "unnormalised": [], "pntk-cnn": [], "narrow-readout": []}
    for done, width in enumerate(widths):
        ctx.progress(done, len(widths), "widths")
        dense = _network(width, ctx.generator("dense", width), convolutional=False)
        full, pseudo = entk(dense, x).full, pntk(dense, x).full
        errors["pntk"].append(_relative_error(full, pseudo))
        errors["unnormalised"].append(_relative_error(full, pseudo * full.shape[-1]))
        # The CNN's width is a quarter: its parameters grow with the square of it.
        for arm, readout in (("pntk-cnn", None), ("narrow-readout", 4)):
            conv = _network(width // 4, ctx.generator("conv", width), convolutional=True, readout=readout)
            errors[arm].append(_relative_error(entk(conv, x).full, pntk(conv, x).full))
    for arm, values in errors.items():
        for width, value in zip(widths, values, strict=True):
            ctx.measure(arm, step=width, error=value)
        slope = _slope(widths, values)
        ctx.measure(arm, slope=slope, slope_excess=abs(slope + 0.5), error_widest=values[-1])


@claim(
    CARD,
    checks=(
        Check.at_least("the same class is predicted", method="pntk", metric="agreement", bound=0.95),
        Check.at_least("at most an eighth of the time is spent", method="pntk", metric="speed_up", bound=8.0),
    ),
    sabotage={"narrow-readout": "pntk"},
    seeds=5,
    minutes=2.0,
    data=("digits",),
)
def predicts_like_the_full_kernel(ctx: Ctx) -> None:
    """Kernel regression with the pseudo-NTK predicts the full kernel's classes, at a fraction of the time.

    Digits, 300 training and 200 test samples, MLP of width 1024. The speed-up is CPU time of both kernels and solves.
    The control narrows the readout to width 4.
    """
    train, test = ctx.scaled((300, 200), (60, 40))
    data = ctx.data("digits", train=train, test=test)
    x, y, z = data.train_x.flatten(1)[:train], data.train_y[:train], data.test_x.flatten(1)[:test]
    width = ctx.scaled(1024, 128)
    targets = nn.functional.one_hot(y, 10).to(x) - 0.1
    for arm, readout in (("pntk", None), ("narrow-readout", 4)):
        model = _network(width, ctx.generator("model"), convolutional=False, readout=readout)
        started = time.process_time()
        K, k = entk(model, x).matrix(), entk(model, z, x).matrix()
        exact = (k @ _solve(K, targets.T.flatten())).view(10, len(z)).T
        middle = time.process_time()
        P, p = pntk(model, x).matrix(), pntk(model, z, x).matrix()
        approximate = p @ _solve(P, targets)
        ended = time.process_time()
        agreement = float((exact.argmax(1) == approximate.argmax(1)).double().mean())
        ctx.measure(arm, agreement=agreement, speed_up=(middle - started) / max(ended - middle, 1e-9))


def _solve(kernel: Tensor, targets: Tensor) -> Tensor:
    """Solve (K + 1e-4 mean(diag K) I) a = y in float64; the same relative ridge for both kernels."""
    K = kernel.double()
    ridge = 1e-4 * K.diagonal().mean()
    factor = torch.linalg.cholesky(K + ridge * torch.eye(len(K), dtype=K.dtype))
    right = targets.double()
    solution = torch.cholesky_solve(right.reshape(len(K), -1), factor)
    return solution.reshape(right.shape).to(kernel.dtype)
