"""Coherence of per-example gradients: how many other examples a step on one example helps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure._kit import BadData, UsageError
from nervure.core.forward import batch_size, outputs, take
from nervure.core.graph import Stage, as_batches
from nervure.core.persample import Loss, PerSample, sample_losses
from nervure.core.vectors import select, unflatten
from nervure.inspect._coherence_trial import memorised, mixed_labels, trained
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="gradient-coherence",
    n=257,
    title="On the Generalization Mystery in Deep Learning",
    year=2022,
    link="https://arxiv.org/abs/2203.10036",
    family="inspect",
    summary=(
        "Networks generalise where the gradients of single examples point the same way. m-coherence counts how many "
        "examples a step on one example helps on average: 1 for orthogonal gradients, m for equal ones. Rules that "
        "drop what few examples share, such as a median of micro-batch gradients, memorise fewer wrong labels."
    ),
    tags=("coherence", "per-example gradients", "generalisation", "memorisation", "label noise", "robust gradients"),
    provides=("m_coherence", "Coherence", "median_of_means_", "winsorized_"),
    protocol="diagnostic",
    claims=("true_labels_cohere", "the_median_memorises_less"),
    needs=("data", "labels"),
    deviations=(
        "alpha is the ratio over the given examples, as in the paper, where m orthogonal gradients give 1 / m; the "
        "value without that diagonal part stands beside it, with its jackknife standard error.",
        "ImageNet is not used; the claims are on digits.",
    ),
    verified=(
        "Loops over examples in float64 on every model of the zoo; orthogonal gradients give 1, equal ones m.",
        "The jackknife by leaving each example out in turn.",
    ),
)


@dataclass(frozen=True)
class Aligned:
    """Hold the alignment of the gradients of m examples, over some parameters.

    Args:
        alpha: |mean g|^2 / mean |g|^2, between 0 and 1.
        m: The number of examples.
        shared: The mean inner product of two different examples over the mean squared norm: 0 for orthogonal gradients
            whatever m is, 1 for equal ones, below 0 for opposing ones.
        error: The jackknife standard error of `shared`.
    """

    alpha: float
    m: int
    shared: float
    error: float

    @property
    def m_coherence(self) -> float:
        """How many examples a step on one of them helps on average: m alpha."""
        return self.m * self.alpha


@dataclass(frozen=True)
class Coherence:
    """Report how coherent the gradients of single examples are.

    Args:
        whole: Over all parameters.
        layers: Module -> the same over its own parameters, in the model's order.
    """

    whole: Aligned
    layers: Mapping[str, Aligned]

    @property
    def verdict(self) -> str:
        """Return "ok" where examples share a direction, "warn" where not, "cannot tell" where the error is too large.

        Shared means more than two standard errors above zero; not shared, that two errors above it is below 0.01.
        """
        whole = self.whole
        if not math.isfinite(whole.shared) or not math.isfinite(whole.error):
            return "cannot tell"
        if whole.shared > 2 * whole.error:
            return "ok"
        return "warn" if whole.shared + 2 * whole.error < 0.01 else "cannot tell"


def m_coherence(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    loss: Loss = F.cross_entropy,
    parameters: Iterable[str] | None = None,
    seed: int = 0,
) -> Coherence:
    """Measure alpha = |mean g|^2 / mean |g|^2 over the gradients g of the examples, whole and for each layer.

    Two passes over the batches, of which only one is in memory. Linear layers are never written out example by
    example.

    Args:
        model: The model; batch normalisation must be in eval mode, where examples have gradients of their own.
        batches: One batch (inputs, targets) or a sequence of batches; at least three examples.
        loss: From (output, targets) of a batch to its mean loss.
        parameters: Names or prefixes; None takes all that require a gradient.
        seed: Without effect: nothing is drawn.

    Returns:
        The report. With every gradient zero, alpha is NaN and the verdict "cannot tell".

    Raises:
        BadData: If there are fewer than three examples.

    Examples:
        >>> model = nn.Linear(3, 2)
        >>> batch = (torch.ones(8, 3), torch.zeros(8, dtype=torch.long))
        >>> round(m_coherence(model, batch).whole.m_coherence, 3)
        8.0
    """
    every = as_batches(batches)
    count = sum(batch_size(inputs) for inputs, _ in every)
    if count < 3:
        raise BadData("too few examples for a coherence", expected="at least 3", found=count)
    engine = PerSample(model, every[0], loss, parameters=parameters)
    total = _summed(Stage(model, every, parameters=parameters, method="coherence"), loss)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in total}
    for batch in every:
        for name, pair in engine.against(batch, total).items():
            found[name].append(pair)
    parts = {
        name: (
            float(total[name].double().square().sum()),
            torch.cat([norms for norms, _ in pairs]).double(),
            torch.cat([along for _, along in pairs]).double(),
        )
        for name, pairs in found.items()
    }
    layers: dict[str, list[str]] = {}
    for name in parts:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return Coherence(
        _aligned(list(parts.values())),
        {layer: _aligned([parts[name] for name in names]) for layer, names in layers.items()},
    )


def _summed(stage: Stage, loss: Loss) -> dict[str, Tensor]:
    """Return the sum of the gradients of all examples."""
    total = torch.zeros(stage.size, dtype=stage.dtype, device=stage.device)
    with stage.ready():
        for inputs, targets in stage.batches:
            graph = stage.graph(inputs)
            losses = sample_losses(loss, graph.output, targets)
            total += graph.pull(losses, torch.ones_like(losses))
    return unflatten(total, stage.parameters)


def _aligned(parts: Sequence[tuple[float, Tensor, Tensor]]) -> Aligned:
    """Return the alignment from |S|^2, |g_n|^2 and <g_n, S> of some parameters, S being the sum of all gradients."""
    whole = sum(square for square, _, _ in parts)
    norms = torch.stack([one for _, one, _ in parts]).sum(0)
    along = torch.stack([one for _, _, one in parts]).sum(0)
    m, energy = len(norms), float(norms.sum())
    if not energy > 0:
        return Aligned(math.nan, m, math.nan, math.nan)
    # Without example n the sum of gradients has the square |S|^2 - 2 <g_n, S> + |g_n|^2.
    left, squares = energy - norms, whole - 2 * along + norms
    without = (squares - left) / ((m - 2) * left)
    error = math.sqrt((m - 1) * float(without.var(correction=0)))
    return Aligned(whole / (m * energy), m, (whole - energy) / ((m - 1) * energy), error)


def median_of_means_(model: nn.Module, batch: Batch, *, loss: Loss = F.cross_entropy, parts: int = 3) -> float:
    """Set every gradient to the coordinate-wise median of the gradients of micro-batches, in place.

    To be called where a plain loop calls ``backward``; any optimizer follows. With three parts it is the paper's M3: a
    direction that only the examples of one part ask for is dropped.

    Args:
        model: The model.
        batch: Inputs and targets.
        loss: From (output, targets) of a batch to its mean loss.
        parts: Number of micro-batches, at least 3; the examples of a batch should be in random order.

    Returns:
        The mean loss of the parts.

    Raises:
        UsageError: If the batch cannot be cut into so many parts.

    Examples:
        >>> model, batch = nn.Linear(4, 2), (torch.randn(12, 4), torch.randint(2, (12,)))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for _ in range(3):
        ...     _ = median_of_means_(model, batch)
        ...     optimizer.step()
    """
    inputs, targets = batch
    size = batch_size(inputs)
    if not 3 <= parts <= size:
        raise UsageError("the batch cannot be cut so", expected=f"3 to {size} parts", found=parts)
    chosen = list(select(model).values())
    losses, found = [], []
    for index in torch.arange(size).tensor_split(parts):
        value = loss(outputs(model, take(inputs, index)), take(targets, index))
        found.append(torch.autograd.grad(value, chosen, allow_unused=True))
        losses.append(float(value.detach()))
    for parameter, gradients in zip(chosen, zip(*found, strict=True), strict=True):
        known = [one for one in gradients if one is not None]
        parameter.grad = _median(torch.stack(known)) if known else None
    return sum(losses) / parts


def _median(stacked: Tensor) -> Tensor:
    """Return the median along the first axis; of an even number, the mean of the middle two."""
    ordered, count = stacked.sort(0).values, len(stacked)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def winsorized_(model: nn.Module, batch: Batch, *, loss: Loss = F.cross_entropy, drop: int = 1) -> None:
    """Set every gradient to the mean of its examples' values, the extreme ones moved to the next less extreme.

    In each coordinate the `drop` largest values count as the next largest, and the same at the other end. All
    gradients of the batch are in memory at once.

    Args:
        model: The model; batch normalisation must be in eval mode.
        batch: Inputs and targets.
        loss: From (output, targets) of a batch to its mean loss.
        drop: How many examples at each end are moved, at least 0 and below half the batch.

    Raises:
        UsageError: If the batch is too small for that.
    """
    size = batch_size(batch[0])
    if not 0 <= drop < size / 2:
        raise UsageError("so many examples cannot be moved", expected=f"0 to {(size - 1) // 2}", found=drop)
    chosen = select(model)
    for name, value in PerSample(model, batch, loss).gradients(batch).items():
        ordered = value.sort(0).values
        chosen[name].grad = value.clamp(ordered[drop], ordered[size - 1 - drop]).mean(0)


_EPOCHS = (2, 5, 10)


@claim(
    CARD,
    checks=(
        Check.at_least("five times as coherent as random labels", method="true labels", metric="ratio", bound=5.0,
                       rule="every-seed"),
        Check.at_least("k copies of every example multiply it by k", method="four copies", metric="exact", bound=1.0),
    ),
    sabotage={"random labels again": "true labels"},
    seeds=5,
    minutes=1.0,
    data=("digits",),
)  # fmt: skip
def true_labels_cohere(ctx: Ctx) -> None:
    """Early in training the m-coherence under true labels is at least five times that under random labels.

    600 digits, MLP 64-128-128-10, SGD of rate 0.1 in batches of 50; the ratio is the least of those after epochs 2, 5
    and 10. The control draws the random labels twice. Normal inputs with random labels stand beside it, and four copies
    of every example, which must have four times the m-coherence.
    """
    data = ctx.data("digits", train=600)
    x, y = data.train_x.flatten(1), data.train_y
    draw = ctx.generator("labels")
    shuffled, again = (y[torch.randperm(len(y), generator=draw)] for _ in range(2))
    noise = torch.randn(x.shape, generator=draw)
    arms = {
        "true labels": (x, y),
        "random labels": (x, shuffled),
        "random labels again": (x, again),
        "normal inputs": (noise, shuffled),
    }
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for arm, (inputs, labels) in arms.items():
        for epoch, model in trained(ctx, inputs, labels, epochs=_EPOCHS):
            seen = m_coherence(model, (inputs, labels)).whole
            found[arm].append(seen.m_coherence)
            ctx.measure(arm, step=epoch, m_coherence=seen.m_coherence, shared=seen.shared)
            if arm == "true labels" and epoch == _EPOCHS[0]:
                copied = m_coherence(model, (inputs.repeat(4, 1), labels.repeat(4))).whole
                ratio = copied.m_coherence / seen.m_coherence
                ctx.measure("four copies", exact=float(abs(ratio - 4) < 1e-3), times=ratio)
    for arm in ("true labels", "random labels again"):
        pairs = zip(found[arm], found["random labels"], strict=True)
        ctx.measure(arm, ratio=min(one / max(other, 1e-12) for one, other in pairs))


@claim(
    CARD,
    checks=(
        Check.at_least("three tenths fewer wrong labels", method="median of three", metric="saved", bound=0.3),
        Check(name="clean accuracy within two points", method="median of three", control="mean of three",
              metric="accuracy", margin=-0.02),
    ),
    sabotage={"mean of three": "median of three"},
    seeds=5,
    minutes=3.0,
    data=("digits",),
)  # fmt: skip
def the_median_memorises_less(ctx: Ctx) -> None:
    """The median of three micro-batch gradients memorises at least 30% fewer wrong labels, at equal clean accuracy.

    600 digits of which half have a random other label, MLP 64-128-128-10, SGD of rate 0.1 in batches of 60 cut into
    three, 100 epochs. Saved is one less the share of wrong labels learned over that share under the plain mean, which
    is the control and the sabotaged arm.
    """
    data = ctx.data("digits", train=600)
    x, truth = data.train_x.flatten(1), data.train_y
    labels = mixed_labels(truth, data.classes, ctx.generator("wrong labels"))
    epochs = ctx.scaled((10, 20, 40, 60, 80, 100), (4, 8))
    shares = {}
    for arm, rule in (("mean of three", None), ("median of three", median_of_means_)):
        for epoch, model in trained(ctx, x, labels, epochs=epochs, size=60, rule=rule):
            shares[arm] = memorised(model, x, truth, labels)
            clean = ctx.accuracy(model, data.test_x.flatten(1), data.test_y)
            ctx.measure(arm, step=epoch, memorised=shares[arm], accuracy=clean)
        ctx.measure(arm, memorised=shares[arm], accuracy=clean)
    for arm, share in shares.items():
        ctx.measure(arm, saved=1 - share / max(shares["mean of three"], 1e-12))
