"""The samples that make a training loss spike: two groups whose losses swing against each other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure._kit import BadData, UsageError
from nervure.core.forward import batch_size, take
from nervure.core.graph import Stage, as_batches
from nervure.core.lanczos import eigenpairs
from nervure.core.operators import hessian
from nervure.core.persample import Loss, sample_losses
from nervure.core.recorder import Recorder
from nervure.core.rng import generator
from nervure.core.vectors import flatten, unflatten
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="opposing-signals",
    n=8,
    title="Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization",
    year=2023,
    link="https://arxiv.org/abs/2311.04163",
    family="inspect",
    summary=(
        "Where a training loss spikes, few samples carry much of the change: one group's losses rise while another's "
        "fall, and the next step swaps them. The groups share a large feature that their labels use in opposite ways."
    ),
    tags=("outliers", "loss spikes", "edge of stability", "sharpness", "per-sample loss", "gradient descent"),
    provides=("opposing_groups", "OpposingGroups", "find_spike", "Spike"),
    protocol="diagnostic",
    claims=("few_samples_make_the_spike",),
    needs=("data", "labels"),
    deviations=(
        "Gradients and eigenvector are taken just before the spike, where they oppose most clearly, and once more just "
        "after it; the paper's exact choice is not known here, nor how many samples make a group.",
        "The first weights follow torch's law, as another one started beyond the edge of stability in a rehearsal.",
    ),
    verified=(
        "Losses of every step against those of the weights of that step; sharpness against the dense Hessian.",
        "A two-layer linear network on two opposing groups: both are found, and they swing with a period of two steps.",
    ),
)


@dataclass(frozen=True)
class Spike:
    """Hold the step at which the mean loss rose most, and who rose and fell with it.

    Args:
        step: Index of the record before the rise.
        rise: Rise of the mean loss over the loss before.
        rising: Samples whose losses rose most, the largest first.
        falling: Samples whose losses fell most.
        share: Part of all absolute changes that the largest ones carry, as many as are in both groups.
        uniform: That part if all samples changed equally.
        next_step: Correlation of the groups' changes at the spike with those one step later: -1 where they swap.
    """

    step: int
    rise: float
    rising: Tensor
    falling: Tensor
    share: float
    uniform: float
    next_step: float


def find_spike(losses: Tensor, *, fraction: float = 0.04, least: float = 1e-4) -> Spike | None:
    """Find the largest rise of the mean loss in the losses of samples over steps, and the groups that made it.

    Args:
        losses: Losses of N samples at T successive steps, shape (T, N), T at least 3; as
            `nervure.core.recorder.Recorder.curve` returns them.
        fraction: Part of the samples in both groups together, in (0, 1].
        least: Smallest rise that counts, relative to the mean loss before it.

    Returns:
        The spike, or None if the mean loss never rose so much before the last step.

    Raises:
        BadData: If there are fewer than three steps or four samples, or a loss is not finite.
        UsageError: If a number is out of range.

    Examples:
        >>> swing = torch.tensor([1.0, 1.2, 0.9])[:, None] * torch.tensor([1.0, 1, 1, 1, 1, 5])
        >>> find_spike(swing, fraction=1 / 3).rising
        tensor([5])
    """
    if losses.ndim != 2 or len(losses) < 3 or losses.shape[1] < 4 or not bool(losses.isfinite().all()):
        raise BadData(
            "no spike can be looked for", expected="finite losses, 3 steps of 4 samples", found=tuple(losses.shape)
        )
    if not 0 < fraction <= 1 or least < 0:
        raise UsageError("a number is out of range", expected="0 < fraction <= 1, least >= 0", found=(fraction, least))
    mean = losses.double().mean(1)
    rises = mean[1:-1] - mean[:-2]
    step = int(rises.argmax())
    rise = float(rises[step] / mean[step].abs().clamp_min(1e-300))
    if not rise > least:
        return None
    count = losses.shape[1]
    k = max(1, min(count // 2, round(fraction * count / 2)))
    change = (losses[step + 1] - losses[step]).double()
    order = change.argsort()
    rising, falling = order.flip(0)[:k], order[:k]
    size = change.abs()
    share = float(size.topk(2 * k).values.sum() / size.sum())
    both = torch.cat([rising, falling])
    pair = torch.stack([change[both], (losses[step + 2] - losses[step + 1]).double()[both]])
    return Spike(step, rise, rising, falling, share, 2 * k / count, float(torch.corrcoef(pair)[0, 1]))


@dataclass(frozen=True)
class Signals:
    """Hold how two groups of samples pull at some weights.

    Args:
        cosine: Between the mean gradients of the rising and of the falling group.
        random: The mean of the same over pairs of random groups.
        mixed: The mean of the same with the samples of both groups dealt out anew.
        rising: Projection of the rising group's mean gradient on the top eigenvector of the Hessian.
        falling: The same of the falling group; the eigenvector's sign is arbitrary, that of their product is not.
        sharpness: The top eigenvalue; NaN where it did not converge.
    """

    cosine: float
    random: float
    mixed: float
    rising: float
    falling: float
    sharpness: float


@dataclass(frozen=True)
class OpposingGroups:
    """Report a stretch of training and the spike in it.

    Args:
        spike: The largest rise, or None.
        losses: Losses of all samples at every step, shape (T, N).
        before: How the groups pull just before the spike, or None.
        after: Just after it.
        features: Mean input of the rising less that of the falling group, over the spread of all inputs; None without
            a spike or where inputs are not one floating-point tensor.
    """

    spike: Spike | None
    losses: Tensor
    before: Signals | None
    after: Signals | None
    features: Tensor | None

    @property
    def gap(self) -> float:
        """Cosine of the groups less that of random ones, before the spike: well below zero where they oppose."""
        return math.nan if self.before is None else self.before.cosine - self.before.random

    @property
    def verdict(self) -> str:
        """Return "ok" without a spike, "warn" where opposing outliers make it, else "cannot tell".

        Outliers: three times an equal share of the change; opposing: a gap of -0.2 or less.
        """
        if self.spike is None:
            return "ok"
        return "warn" if self.spike.share >= 3 * self.spike.uniform and self.gap <= -0.2 else "cannot tell"


def opposing_groups(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    loss: Loss = F.cross_entropy,
    learning_rate: float = 0.1,
    steps: int = 20,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    fraction: float = 0.04,
    least: float = 1e-4,
    parameters: Iterable[str] | None = None,
    seed: int = 0,
) -> OpposingGroups:
    """Train a copy by full-batch steps, find the largest spike and tell how its groups pull against each other.

    For a run of your own, record `nervure.core.recorder.losses_of` at every step and give the curve to `find_spike`.

    Args:
        model: The model; it is not changed. Batch normalisation must be in eval mode.
        batches: All samples: one batch (inputs, targets) or a sequence of batches.
        loss: From (output, targets) of a batch to its mean loss.
        learning_rate: Of plain gradient descent, above 0.
        steps: Steps, at least 2.
        optimizer: From parameters to another optimizer, which takes the place of plain descent.
        fraction: As in `find_spike`.
        least: As in `find_spike`.
        parameters: Names or prefixes of what is trained; None takes all that require a gradient.
        seed: Draws the random groups and the start of Lanczos.

    Returns:
        The report.

    Raises:
        UsageError: If a number is out of range.

    Examples:
        >>> x = torch.randn(64, 4)
        >>> quiet = opposing_groups(nn.Linear(4, 1), (x, x[:, :1]), loss=F.mse_loss, learning_rate=0.01)
        >>> quiet.verdict, quiet.losses.shape
        ('ok', torch.Size([21, 64]))
    """
    if learning_rate <= 0 or steps < 2:
        raise UsageError(
            "no such training", expected="learning_rate > 0, at least 2 steps", found=(learning_rate, steps)
        )
    every = as_batches(batches)
    twin = copy.deepcopy(model)
    stage = Stage(twin, every, parameters=parameters, method="opposing signals")
    chosen = list(stage.parameters.values())
    rule = optimizer(chosen) if optimizer else torch.optim.SGD(chosen, lr=learning_rate)
    seen: list[Tensor] = []
    recorder = Recorder({"losses": lambda: seen[0]}, every=1)
    most, mean, here = -math.inf, math.inf, flatten(chosen).detach()
    kept = (here, here)
    with stage.ready():
        for step in range(steps + 1):
            last, before = here, mean
            seen[:] = [_accumulated(stage, loss)]
            recorder.step(step)
            mean, here = float(seen[0].double().mean()), flatten(chosen).detach()
            # A rise counts only where one step more follows, as in `find_spike`.
            if step < steps:
                if mean - before > most:
                    most, kept = mean - before, (last, here)
                rule.step()
    losses = recorder.curve("losses")
    spike = find_spike(losses, fraction=fraction, least=least)
    if spike is None:
        return OpposingGroups(None, losses, None, None, None)
    found = []
    for weights in kept:
        with torch.no_grad():
            for value, part in zip(chosen, unflatten(weights, stage.parameters).values(), strict=True):
                value.copy_(part)
        found.append(_signals(stage, loss, spike, seed))
    return OpposingGroups(spike, losses, found[0], found[1], _features(every, spike))


def _accumulated(stage: Stage, loss: Loss) -> Tensor:
    """Set the gradients of the mean loss over all samples and return the loss of each."""
    found, total = [], torch.zeros(stage.size, dtype=stage.dtype, device=stage.device)
    for inputs, targets in stage.batches:
        graph = stage.graph(inputs)
        losses = sample_losses(loss, graph.output, targets)
        total += graph.pull(losses, torch.full_like(losses, 1 / stage.samples))
        found.append(losses.detach())
    for value, part in zip(stage.parameters.values(), unflatten(total, stage.parameters).values(), strict=True):
        value.grad = part
    return torch.cat(found)


def _signals(stage: Stage, loss: Loss, spike: Spike, seed: int) -> Signals:
    """Return how the groups pull at the weights the stage's model has now."""
    k, count = len(spike.rising), stage.samples
    both = torch.cat([spike.rising, spike.falling])
    draw = generator("opposing signals", seed)
    chance = [torch.randperm(count, generator=draw)[: 2 * k] for _ in range(10)]
    dealt = [both[torch.randperm(2 * k, generator=draw)] for _ in range(10)]
    weights = torch.zeros(2 * (1 + len(chance) + len(dealt)), count)
    for row, group in enumerate(part for pair in (both, *chance, *dealt) for part in (pair[:k], pair[k:])):
        weights[row, group] = 1 / k
    pulls = _pulls(stage, loss, weights).double()
    pairs = F.cosine_similarity(pulls[0::2], pulls[1::2], dim=1)
    operator = hessian(stage.model, stage.batches, loss, parameters=stage.parameters)
    top = eigenpairs(operator, 1, which="largest", tolerance=1e-3, limit=100, seed=seed)
    along = (pulls[:2] @ top.vectors[:, 0].double()).tolist()
    sharpness = float(top.values[0]) if bool(top.converged[0]) else math.nan
    chances, mixes = pairs[1:].view(2, -1).mean(1).tolist()
    return Signals(float(pairs[0]), chances, mixes, along[0], along[1], sharpness)


def _pulls(stage: Stage, loss: Loss, weights: Tensor) -> Tensor:
    """Return weighted sums of the gradients of samples, shape (K, P), by one backward pass for each and batch."""
    total = torch.zeros(len(weights), stage.size, dtype=stage.dtype, device=stage.device)
    start = 0
    with stage.ready():
        for inputs, targets in stage.batches:
            graph = stage.graph(inputs)
            losses = sample_losses(loss, graph.output, targets)
            part = weights[:, start : start + batch_size(inputs)].to(losses)
            start += batch_size(inputs)
            total += torch.stack([graph.pull(losses, row) for row in part])
    return total


def _features(batches: Sequence[Batch], spike: Spike) -> Tensor | None:
    inputs = [one for one, _ in batches]
    if not all(isinstance(one, Tensor) and one.is_floating_point() for one in inputs):
        return None
    x = torch.cat(inputs).double()
    spread = x.std(0).clamp_min(1e-12)
    return (take(x, spike.rising).mean(0) - take(x, spike.falling).mean(0)) / spread


@claim(
    CARD,
    checks=(
        Check.at_least("4% carry three times an equal share", method="edge", metric="times_uniform", bound=3.0),
        Check.at_most("the groups are less aligned than random ones", method="groups", metric="gap", bound=-0.2),
        Check.at_most("the next step swaps them", method="edge", metric="next_step", bound=0.0),
        Check.at_most("no spike before the edge", method="half the rate", metric="spikes", bound=0.0),
    ),
    sabotage={"dealt out anew": "groups"},
    seeds=3,
    minutes=2.0,
    data=("digits",),
)  # fmt: skip
def few_samples_make_the_spike(ctx: Ctx) -> None:
    """At the edge of stability few samples carry a spike, their two groups pull apart, and the next step swaps them.

    1000 centred digits, tanh MLP 64-100-100-10, squared loss, 3000 steps of gradient descent of rate 0.2; groups of 20
    rising and 20 falling samples, gradients just before the spike. The sabotaged arm deals the samples of both groups
    out anew. At half the rate, 1000 steps end before the edge, and no spike may be found.
    """
    data = ctx.data("digits", train=1000)
    x, labels = data.train_x.flatten(1), data.train_y
    x, y = x - x.mean(0), F.one_hot(labels, data.classes).float()
    model = _tanh_mlp(ctx)
    quiet = _descent(model, (x, y), rate=0.1, steps=ctx.scaled(1000, 100))
    ctx.measure("half the rate", spikes=float(quiet.spike is not None))
    ctx.progress(1, 4, "half the rate")
    found = _descent(model, (x, y), rate=0.2, steps=ctx.scaled(3000, 1000))
    spike, before, after = found.spike, found.before, found.after
    if spike is None or before is None or after is None:
        ctx.measure("edge", times_uniform=0.0, next_step=1.0)
        ctx.measure("groups", gap=0.0)
        return
    ctx.measure("edge", times_uniform=spike.share / spike.uniform, next_step=spike.next_step, step_of_spike=spike.step)
    ctx.measure("edge", classes_up=_classes(labels[spike.rising]), classes_down=_classes(labels[spike.falling]))
    ctx.measure("edge", sharpness_times_rate=before.sharpness * 0.2, rise=spike.rise)
    ctx.measure("groups", gap=found.gap, cosine=before.cosine, random=before.random)
    ctx.measure("groups", along=before.rising, along_falling=before.falling)
    ctx.measure("after the spike", gap=after.cosine - after.random, along=after.rising, along_falling=after.falling)
    ctx.measure("dealt out anew", gap=before.mixed - before.random)


def _descent(model: nn.Module, batch: Batch, *, rate: float, steps: int) -> OpposingGroups:
    return opposing_groups(model, batch, loss=_half_square, learning_rate=rate, steps=steps)


def _half_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(1).mean() / 2


def _tanh_mlp(ctx: Ctx) -> nn.Sequential:
    """Return a tanh MLP 64-100-100-10 of torch's own initial law, which starts at a quarter of the edge's sharpness."""
    layers: list[nn.Module] = []
    source = ctx.generator("start")
    for inputs, outputs in ((64, 100), (100, 100), (100, 10)):
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            for value in layer.parameters():
                value.copy_((2 * torch.rand(value.shape, generator=source) - 1) / inputs**0.5)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _classes(labels: Tensor) -> int:
    """Return how many classes hold nine tenths of a group."""
    counts = labels.bincount().sort(descending=True).values.cumsum(0)
    return int((counts < 0.9 * len(labels)).sum()) + 1
