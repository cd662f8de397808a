"""Late generalisation as leaving the kernel regime: a wrapper that makes any network lazy, and what then changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure._kit import BadData, UsageError
from nervure.core import forward, rng
from nervure.core.layerwise import tangent_kernel
from nervure.core.similarity import cka
from nervure.core.taps import execution_order, tap
from nervure.inspect._delayed import Task, Times, explained, train
from nervure.spec import Card, Check, Ctx, claim

CARD = Card(
    id="grokking-lazy-rich",
    n=10,
    title="Grokking as the Transition from Lazy to Rich Training Dynamics",
    year=2023,
    link="https://arxiv.org/abs/2310.06110",
    family="inspect",
    summary=(
        "A network whose output is scaled up and centred stays near its tangent kernel for long. If that kernel fits "
        "the training data and is blind to the target, the network generalises only when its features begin to move: "
        "grokking without weight decay."
    ),
    tags=("grokking", "lazy training", "feature learning", "neural tangent kernel", "kernel alignment", "output scale"),
    provides=("LazyRich", "laziness", "Laziness", "alignment", "linearised"),
    claims=("lazier_networks_generalise_later",),
    needs=("grad",),
    deviations=(
        "The mean-field equations, the experiments on MNIST and the transformer are not in the claim.",
        "Changes of weights, of the kernel and of every layer's features are reported together: an aligned kernel "
        "alone does not tell a lazy run from a rich one.",
        "The step of 4 N / alpha^2 is that of the times measured in a pilot.",
    ),
    verified=(
        "The kernel of the polynomial network against its closed form and torch.func Jacobians, to 1e-10.",
        "Trained at a scale of 1000 it gives the predictions of kernel regression to 1%.",
        "The linearised curve against gradient descent on the linearised network, step by step.",
    ),
)


class LazyRich(nn.Module):
    """Scale a network's output up and take its initial output away: alpha (f(x; w) - f(x; w_0)).

    A large alpha keeps the training lazy, for with a rate of `rate(lr)` the function moves as fast and the weights
    alpha times less. The copy at w_0 has no trainable parameters, travels with the state, and sees the same dropout.

    Args:
        model: Any module; its own parameters are trained.
        alpha: The scale, above 0.

    Raises:
        UsageError: If the scale is not positive.

    Examples:
        >>> lazy = LazyRich(nn.Linear(3, 2), alpha=8.0)
        >>> lazy(torch.randn(4, 3)).abs().max().item(), lazy.rate(0.64)
        (0.0, 0.01)
    """

    def __init__(self, model: nn.Module, alpha: float) -> None:
        super().__init__()
        if not alpha > 0:
            raise UsageError("the scale is not positive", expected="alpha > 0", found=alpha)
        self.alpha = alpha
        self.model = model
        self.start = copy.deepcopy(model).requires_grad_(False)

    def rate(self, lr: float) -> float:
        """Return lr / alpha^2, at which the function moves as fast as the unscaled one at lr.

        Args:
            lr: The rate of the unscaled network.

        Returns:
            The rate.
        """
        return lr / self.alpha**2

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return alpha times what the main output moved.

        Args:
            *args: Passed to the network.
            **kwargs: Passed to the network.

        Returns:
            The main output, scaled and centred.
        """
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):  # both draw the same dropout
            first = self._output(self.start, args, kwargs)
        return self.alpha * (self._output(self.model, args, kwargs) - first)

    @staticmethod
    def _output(model: nn.Module, args: Any, kwargs: Any) -> Tensor:
        return forward.logits(model(*args, **kwargs))


def alignment(kernel: Tensor, targets: Tensor) -> float:
    """Return how well a kernel fits targets, <K, Y Y'> / (|K| |Y Y'|); for one output y'K y / (|K| |y|^2).

    Args:
        kernel: Shape (N, N).
        targets: Numbers of N samples, shape (N, ...), or N classes, which are made one-hot.

    Returns:
        Between 0 and 1; 0 where one of the two is zero.

    Raises:
        BadData: If there is not one target for each sample.
    """
    if len(targets) != len(kernel):
        raise BadData("one target for each sample is needed", expected=len(kernel), found=len(targets))
    values = targets if targets.is_floating_point() else F.one_hot(targets)
    y, k = values.double().cpu().reshape(len(kernel), -1), kernel.double().cpu()
    scale = float(k.norm() * (y @ y.T).norm())
    return float((y * (k @ y)).sum()) / scale if scale else 0.0


def linearised(kernel: Tensor, cross: Tensor, targets: Tensor, rate: float, steps: Sequence[int]) -> Tensor:
    """Return what the linearised network predicts after so many steps of gradient descent on the mean squared error.

    f_t = K_* K^+ (1 - (1 - 2 rate K / N)^t) y, which needs no step at all.

    Args:
        kernel: The tangent kernel of N training samples, shape (N, N).
        cross: That of M samples against these, shape (M, N).
        targets: What the change of the network's output is fitted to, shape (N,).
        rate: The learning rate.
        steps: Numbers of steps.

    Returns:
        Predictions, shape (T, M), float64.
    """
    values, vectors = torch.linalg.eigh(kernel.double())
    count = torch.as_tensor(steps, dtype=torch.float64)[:, None]
    speed = 2 * rate / len(kernel)
    # (1 - (1 - speed v)^t) / v, which tends to t speed where v tends to 0.
    small = values.abs() * len(kernel) < 1e-12 * values.abs().max()
    safe = torch.where(small, 1.0, values)
    weight = torch.where(small, count * speed, (1 - (1 - speed * values).pow(count)) / safe)
    return (weight * (vectors.T @ targets.double())) @ (cross.double() @ vectors).T


@dataclass(frozen=True)
class Laziness:
    """Say what moved between two states of a network. Lazy training moves its function and nothing of this.

    Args:
        weight: |w - w_0| / |w_0| over all trainable parameters.
        kernel: |K - K_0| / |K_0| of the tangent kernels.
        kernel_direction: 1 less the cosine between the kernels: what is left when their scale is disregarded.
        features: Layer -> 1 less unbiased linear CKA between its outputs then and now: 0 is no change up to rotation
            and scale. Layers whose outputs do not differ enough between the samples to tell are left out.
        aligned: Alignment of the kernel with the targets now and at the start; None without targets.
    """

    weight: float
    kernel: float
    kernel_direction: float
    features: Mapping[str, float]
    aligned: tuple[float, float] | None


def laziness(model: nn.Module, start: nn.Module, inputs: Any, targets: Tensor | None = None) -> Laziness:
    """Compare a network with the state it started from: its weights, its tangent kernel and every layer's features.

    Args:
        model: The network now; both are measured in eval mode and left as they were.
        start: The same network as it was at the start, such as a copy or `LazyRich.start`.
        inputs: Inputs of some samples, at least four.
        targets: Their targets, for the alignment of the kernel.

    Returns:
        The changes.

    Raises:
        BadData: If the two networks have not the same parameters, or there are too few samples.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> laziness(net, net, torch.randn(5, 3)).kernel
        0.0
    """
    shapes = [{name: value.shape for name, value in each.named_parameters()} for each in (model, start)]
    if shapes[0] != shapes[1] or forward.batch_size(inputs) < 4:
        raise BadData("nothing to compare", expected="two states of one network, and four samples or more")
    flags = [value.requires_grad for value in model.parameters()]
    twin = copy.deepcopy(start)
    for value, flag in zip(twin.parameters(), flags, strict=True):
        value.requires_grad_(flag)
    kernels, seen = [], []
    for each in (model, twin):
        with forward.mode(each, train=False):
            kernels.append(tangent_kernel(each, inputs).double())
            seen.append(_features(each, inputs))
    now, before = kernels
    return Laziness(
        weight=_relative(*(_trained(each) for each in (model, twin))),
        kernel=_relative(now, before),
        kernel_direction=1 - float((now * before).sum() / (now.norm() * before.norm()).clamp_min(1e-300)),
        features=_changes(*seen),
        aligned=None if targets is None else (alignment(now, targets), alignment(before, targets)),
    )


def _trained(model: nn.Module) -> Tensor:
    return torch.cat([value.detach().double().flatten() for value in model.parameters() if value.requires_grad])


def _relative(now: Tensor, before: Tensor) -> float:
    return float((now - before).norm() / before.norm().clamp_min(1e-300))


@torch.no_grad()
def _features(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    with tap(model, execution_order(model, inputs)) as seen:
        forward.call(model, inputs)
    return {name: calls[-1] for name, calls in seen.items()}


def _changes(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, float]:
    """Compare layers, without those where the similarity is not known."""
    pairs = {name: [each.reshape(len(each), -1) for each in (value, before[name])] for name, value in now.items()}
    found = {name: 1 - cka(*pair, estimator="unbiased") for name, pair in pairs.items()}
    return {name: max(0.0, value) for name, value in found.items() if math.isfinite(value)}


class Polynomial(nn.Module):
    """Average phi(w_i . x) over the units, phi(h) = h + (eps / 2) h^2; only the w_i are trained.

    Args:
        inputs: Dimension D of the inputs.
        width: Number of units.
        eps: How far phi is from linear.
    """

    def __init__(self, inputs: int, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.units = nn.Linear(inputs, width, bias=False)
        nn.init.normal_(self.units.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the averages, shape (N,)."""
        h = self.units(x)
        return (h * (1 + self.eps / 2 * h)).mean(1)


_RATE = 4.0


def quadratic_regression(seed: object, *, samples: int, alpha: float, eps: float = 0.05) -> Task:
    """Make the paper's task: y = (b . x)^2 / 2 of normal inputs, x of variance 1 / D and |b|^2 = D = 32, N = 200."""
    dimension, draw = 32, rng.generator("quadratic regression", seed)
    b = torch.randn(dimension, generator=draw)
    b = b * dimension**0.5 / b.norm()
    x = torch.randn(samples + 1000, dimension, generator=draw) / dimension**0.5
    y = (x @ b).square() / 2
    return Task(
        "polynomial",
        (x[:samples], y[:samples]),
        (x[samples:], y[samples:]),
        lambda: LazyRich(Polynomial(dimension, 200, eps), alpha),
        loss=F.mse_loss,
        score=explained,
        memorised=0.9,
        generalised=0.9,
        sgd_lr=_RATE * 200 / alpha**2,
        decay=0.0,
    )


@claim(
    CARD,
    checks=(
        Check.at_least("the delay grows with alpha", method="alpha 4", metric="delay_growth", bound=1.3),
        Check.at_least("the kernel turns to the target", method="alpha 4", metric="alignment_gain", bound=2.0),
        Check.at_most("it generalises", method="alpha 4", metric="error", bound=0.1),
        Check.at_least("the linearised network never does", method="linearised", metric="error", bound=0.5),
        Check.at_least("nor with 60 samples", method="60 samples", metric="error", bound=0.5),
    ),
    sabotage={"alpha 1 again": "alpha 4", "60 samples": "alpha 4"},
    seeds=5,
    minutes=1.5,
)
def lazier_networks_generalise_later(ctx: Ctx) -> None:
    """The time to generalise over the time to fit the training data grows with the output scale alpha.

    The linearised network never generalises, nor does the network itself with too few samples. Quadratic regression in
    32 dimensions, 200 units of h + 0.025 h^2, 200 samples, at most 30,000 full-batch steps of gradient descent at
    4 N / alpha^2, alpha 1 and 4, without weight decay. Fitted and generalised mean an error of a tenth of the
    variance; errors are the smallest of the run. The arm "alpha 1 again" repeats alpha 1 from other weights.
    """
    steps = ctx.scaled(30_000, 8000)
    first = _run(ctx, "weights", 1.0, 200, steps)
    arms = {
        "alpha 1": first,
        "alpha 4": _run(ctx, "weights", 4.0, 200, steps),
        "alpha 1 again": _run(ctx, "other weights", 1.0, 200, steps),
        "60 samples": _run(ctx, "weights", 1.0, 60, steps),
    }
    for arm, times in arms.items():
        aligned = times.recorder.curve("alignment")
        ctx.measure(
            arm,
            memorise=times.memorise.time,
            generalise=times.generalise.time,
            delay=times.delay,
            delay_growth=times.delay / first.delay if first.delay else 0.0,
            alignment_gain=float(aligned[times.recorder.steps.index(times.generalise.time)] / aligned[0]),
            alignment_gain_then=times.between("alignment") / float(aligned[0]),
            error=1 - float(times.recorder.curve("test").max()),
        )
        lazy = times.model
        moved = laziness(lazy.get_submodule("model"), lazy.get_submodule("start"), times.task.train[0][:50])
        ctx.measure(arm, weight_change=moved.weight, kernel_change=moved.kernel)
    (x, y), (unseen, truth) = first.task.train, first.task.test
    start = LazyRich(copy.deepcopy(first.model.get_submodule("start")).requires_grad_(True), 1.0)
    knots = torch.logspace(0, math.log10(steps), 100).round().tolist()
    curve = linearised(tangent_kernel(start, x), tangent_kernel(start, unseen, x), y, _RATE * 200, knots)
    ctx.measure("linearised", error=1 - max(float(explained(each, truth.double())) for each in curve))


def _run(ctx: Ctx, weights: str, alpha: float, samples: int, steps: int) -> Times:
    task = quadratic_regression(ctx.seed_for("data"), samples=samples, alpha=alpha)
    x, y = task.train

    def tick(step: int) -> None:
        if step % 500 == 0:
            ctx.progress(0, 0, f"alpha {alpha:g}, step {step:,}")

    return train(
        task,
        optimizer=lambda parameters: torch.optim.SGD(parameters, task.sgd_lr),
        seed=ctx.seed_for(weights),
        steps=steps,
        until_generalised=True,
        measures=lambda model: {"alignment": lambda: alignment(tangent_kernel(model, x), y)},
        after_step=tick,
        per_decade=80,
    )
