"""Linear mode connectivity: whether two networks are joined by a straight line of low loss, whole and by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from nervure.core import forward
from nervure.core.connectivity import Line, Statistics, line
from nervure.core.features import features, layers, samples
from nervure.core.graph import as_batches
from nervure.core.line_curvature import curvature_gaps, difference, mean_loss
from nervure.core.matching import Matching, weight_matching
from nervure.core.permutation import PermutationGraph, permuted
from nervure.core.persample import Loss
from nervure.core.similarity import MinibatchCKA
from nervure.inspect._connectivity_trial import elsewhere, perceptron, pooled, sgd, wrong
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="linear-mode-connectivity",
    n=5,
    title="Landscaping Linear Mode Connectivity",
    year=2024,
    link="https://arxiv.org/abs/2406.16300",
    family="inspect",
    summary=(
        "Two trained networks are linearly connected if the loss on the straight line between them does not rise above "
        "the chord. Runs that split late from one start are; independent ones are not, unless their units are put in "
        "one order first. Curvature along the line says how high the barrier is, for the whole and for each layer."
    ),
    tags=("linear mode connectivity", "barrier", "permutation", "weight matching", "CKA", "interpolation", "Hessian"),
    provides=("compare_networks", "LinearModeConnectivity", "layer_barriers", "ridge"),
    protocol="diagnostic",
    claims=("shared_steps_remove_the_barrier", "curvature_ranks_layers"),
    needs=("data", "labels"),
    deviations=(
        "The paper's closed expression for the height of a barrier was not at hand: the exact identity between gap and "
        "curvature is used, and an estimate from few points of the line is called that.",
        "The positive control is a copy of the first network with its units in random order, which computes the same.",
        "The claims use a multilayer perceptron on pooled Fashion-MNIST in place of ResNet and VGG on CIFAR-10.",
        "In the rehearsal random directions of the same length ranked the layers as well (0.69 to 0.64): they stand "
        "beside the claim, and another layer's estimate is the sabotaged arm.",
    ),
    verified=(
        "The gap equals the integral of Hessian-vector products to 1e-6 in float64 on a network of 500 parameters.",
        "A permuted copy is matched exactly on every model of the zoo, and the barrier to it is then 0.",
    ),
)


@dataclass(frozen=True)
class LinearModeConnectivity:
    """Hold how two networks compare.

    Args:
        names: Layers of the first and of the second network, in the order of their forwards.
        cka: Unbiased minibatch CKA of all pairs of layers, shape (layers of the first, layers of the second); NaN
            where a layer does not vary.
        line: The loss between them as they are; None where their shapes differ.
        matching: How the units of the second were put in the order of the first; None where shapes differ.
        aligned: The loss between the first and the matched second; None where shapes differ.
        control: The barrier between the first and the control, which must show one; None where there is no control.
        tolerance: Share of the control's barrier that counts as none.
        least: Smallest barrier of the control, in units of the loss, that says anything.
    """

    names: tuple[tuple[str, ...], tuple[str, ...]]
    cka: Tensor
    line: Line | None
    matching: Matching | None
    aligned: Line | None
    control: float | None
    tolerance: float
    least: float

    @property
    def verdict(self) -> str:
        """Return "ok" where they are connected, as they are or matched, "warn" where not, otherwise "cannot tell".

        It cannot be told for two shapes, without a control, where the control shows no barrier, or where a loss is not
        finite.
        """
        if self.line is None or self.aligned is None or self.control is None:
            return "cannot tell"
        numbers = [*self.line.losses.tolist(), *self.aligned.losses.tolist(), self.control]
        if self.control < self.least or not all(map(math.isfinite, numbers)):
            return "cannot tell"
        lower = min(self.line.barrier, self.aligned.barrier)
        return "ok" if lower <= self.tolerance * self.control else "warn"

    @property
    def same_layers(self) -> dict[str, float]:
        """The CKA of layers of one name in both networks."""
        places = {name: place for place, name in enumerate(self.names[1])}
        return {name: float(self.cka[row, places[name]]) for row, name in enumerate(self.names[0]) if name in places}


def compare_networks(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    other: nn.Module,
    loss: Loss = F.cross_entropy,
    control: nn.Module | None = None,
    points: int = 11,
    statistics: Statistics = "recomputed",
    restarts: int = 2,
    tolerance: float = 0.05,
    least: float = 0.05,
    seed: int = 0,
) -> LinearModeConnectivity:
    """Compare two networks: their layers by CKA, the line between them, and the line after matching their units.

    The barrier is max over t of L((1 - t) a + t b) - [(1 - t) L(a) + t L(b)]. Networks of two shapes have no line; they
    get the CKA alone.

    Args:
        model: A network, left as it is; it is run in eval mode.
        batches: One batch (inputs, targets) or a sequence of batches, of four samples or more each.
        other: The network it is compared with, left as it is.
        loss: From (output, targets) of a batch to its mean loss.
        control: A network that must show a barrier, as one trained from another start does; None takes a copy of the
            model with its units in random order. Without a barrier there the test has no power.
        points: Points on each line, at least 3.
        statistics: Running statistics of batch norms between the networks; see `nervure.core.connectivity.line`.
        restarts: Random starts of the matching.
        tolerance: Share of the control's barrier that counts as none.
        least: Smallest barrier of the control that says anything, in units of the loss.
        seed: Draws the control and the starts.

    Returns:
        The report.

    Examples:
        >>> first, second = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
        >>> batch = (torch.randn(32, 4), torch.randint(3, (32,)))
        >>> report = compare_networks(first, batch, other=second)
        >>> report.matching.certificate, report.cka.shape, report.verdict
        ('optimum', torch.Size([2, 2]), 'cannot tell')
    """
    every = as_batches(batches)
    names, similar = _similarity(model, other, [inputs for inputs, _ in every])
    if _shapes(model) != _shapes(other):
        return LinearModeConnectivity(names, similar, None, None, None, None, tolerance, least)
    measure = mean_loss(every, loss)
    graph = PermutationGraph.of(model, every[0][0])
    matching = weight_matching(model, other, graph, restarts=restarts, seed=seed)

    def between(end: nn.Module) -> Line:
        given = [inputs for inputs, _ in every]
        return line(model, end, measure, shares=points, statistics=statistics, batches=given)

    plain = between(other)
    matched = between(permuted(other, graph, matching.permutations)) if graph.groups else plain
    if control is None and graph.groups:
        control = permuted(model, graph, graph.random(seed=seed))
    height = between(control).barrier if control is not None else None
    return LinearModeConnectivity(names, similar, plain, matching, matched, height, tolerance, least)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in [*model.named_parameters(), *model.named_buffers()]}


def _similarity(
    first: nn.Module, second: nn.Module, inputs: Sequence[Any]
) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], Tensor]:
    models = (first, second)
    names = [layers(model, inputs[0]) for model in models]
    seen = MinibatchCKA()
    for one in inputs:
        if forward.batch_size(one) >= 4 or len(inputs) == 1:
            found = [features(model, one, chosen) for model, chosen in zip(models, names, strict=True)]
            seen.update(*([samples(side[name]) for name in chosen] for side, chosen in zip(found, names, strict=True)))
    return (tuple(names[0]), tuple(names[1])), seen.matrix("unbiased")


@dataclass(frozen=True)
class LayerBarriers:
    """Hold barriers of lines on which one layer moves from one network to the other.

    Args:
        names: The layers.
        measured: The highest gap strictly between, below 0 where the loss is convex along the line, shape (layers, 2):
            the rest at the first network, at the second.
        estimated: The same from the curvature at a few places.
    """

    names: tuple[str, ...]
    measured: Tensor
    estimated: Tensor

    @property
    def rank_correlation(self) -> float:
        """Spearman's correlation of both over all layers and rests; NaN for fewer than three lines."""
        if self.measured.numel() < 3:
            return float("nan")
        return float(spearmanr(self.measured.flatten(), self.estimated.flatten()).statistic)


def layer_barriers(
    first: nn.Module,
    second: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    names: Sequence[str] | None = None,
    loss: Loss = F.cross_entropy,
    nodes: int = 3,
    points: int = 11,
) -> LayerBarriers:
    """Measure the barrier of each layer or block alone, and estimate it from curvature.

    Args:
        first: A network, left as it is.
        second: Another of the same shape.
        batches: One batch (inputs, targets) or a sequence of batches.
        names: Prefixes of the parameters of each layer or block; every module that holds parameters when None.
        loss: From (output, targets) to the mean loss of a batch.
        nodes: As in `curvature_gaps`.
        points: Points on each line, at least 3.

    Returns:
        The barriers.
    """
    every = as_batches(batches)
    measure = mean_loss(every, loss)
    names = _owners(first) if names is None else names
    measured, estimated = torch.empty(len(names), 2), torch.empty(len(names), 2)
    for row, name in enumerate(names):
        for column, (rest, end) in enumerate(((first, second), (second, first))):
            found = line(rest, end, measure, shares=points, parameters=[name], statistics="kept")
            gaps = curvature_gaps(rest, end, every, loss=loss, nodes=nodes, points=points, parameters=[name])
            measured[row, column], estimated[row, column] = found.gaps[1:-1].max(), gaps[1:-1].max()
    return LayerBarriers(tuple(names), measured, estimated)


def _owners(model: nn.Module) -> list[str]:
    """Return the modules that hold parameters of their own, or the parameters where that is the model itself."""
    own = {name: [key for key, _ in one.named_parameters(recurse=False)] for name, one in model.named_modules()}
    return [*own.pop(""), *(name for name, keys in own.items() if keys)]


@dataclass(frozen=True)
class Ridge:
    """Hold where two runs from one network went: down two sides of a mountain, with a ridge between.

    Args:
        cosine: Of the two displacements.
        walked: Lengths of the two displacements.
        start: The loss where they split.
        ends: Their losses.
        height: The loss halfway between the two ends less the mean loss of the ends.
    """

    cosine: float
    walked: tuple[float, float]
    start: float
    ends: tuple[float, float]
    height: float


def ridge(
    spawn: nn.Module,
    first: nn.Module,
    second: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    loss: Loss = F.cross_entropy,
    statistics: Statistics = "recomputed",
) -> Ridge:
    """Describe two runs that split from one network.

    Args:
        spawn: Where they split; left as it is, like the others.
        first: The end of one run.
        second: The end of the other.
        batches: One batch (inputs, targets) or a sequence of batches.
        loss: From (output, targets) to the mean loss of a batch.
        statistics: As in `compare_networks`.

    Returns:
        The ridge; the cosine is NaN where a run did not move.
    """
    every = as_batches(batches)
    measure = mean_loss(every, loss)
    names = [name for name, value in spawn.named_parameters() if value.is_floating_point()]
    one, other = (difference(spawn, end, names).double() for end in (first, second))
    given = (inputs for inputs, _ in every)
    losses = line(first, second, measure, shares=3, statistics=statistics, batches=given).losses.tolist()
    lengths = (float(one.norm()), float(other.norm()))
    cosine = float(one @ other) / math.prod(lengths) if min(lengths) > 0 else math.nan
    return Ridge(cosine, lengths, measure(spawn), (losses[0], losses[2]), losses[1] - (losses[0] + losses[2]) / 2)


_SPAWNS = {"spawn 0": 0, "spawn 50": 50, "spawn 300": 300, "spawn 1000": 1000}
_FLOOR = 0.5  # nats; without such a barrier between independent runs the task is too easy to tell anything


@claim(
    CARD,
    checks=(
        Check.at_most("no barrier after 300 shared steps", method="spawn 300", metric="barrier_ratio", bound=0.05,
                      rule="every-seed"),
        Check.at_most("no barrier after 1000 shared steps", method="spawn 1000", metric="barrier_ratio", bound=0.05,
                      rule="every-seed"),
        Check.at_most("a permuted copy has none once matched", method="permuted, matched", metric="barrier_ratio",
                      bound=1e-6, rule="every-seed"),
    ),
    sabotage={"unshared 300": "spawn 300", "permuted": "permuted, matched"},
    seeds=5,
    minutes=3.0,
    data=("fashion-mnist",),
)  # fmt: skip
def shared_steps_remove_the_barrier(ctx: Ctx) -> None:
    """Two SGD runs from one checkpoint have no barrier once 300 steps were shared; independent starts keep theirs.

    Perceptron 196-128-128-128-10 on 6,000 pooled Fashion-MNIST images, SGD at 0.05 with momentum 0.9, batches of 64.
    Two independent runs of 2,000 steps; one of them is split after 0, 50, 300 and 1,000 steps into two runs of 2,000
    steps each with batches in other orders. Barriers of the training loss at 21 points, relative to that between the
    independent runs; below 0.5 nats there nothing is concluded. Unshared: one half of the split and the independent
    run. Permuted: the first network with its units in random order, before and after weight matching.
    """
    data = pooled(ctx.data("fashion-mnist", train=6000, test=10))
    steps, tenth = ctx.scaled(2000, 200), ctx.scaled(1, 10)
    ctx.plan(10 * steps)
    batches = [(data.train_x, data.train_y)]
    first = perceptron(ctx, "first")
    trunk = {after: sgd(ctx, first, data, after // tenth, "a") for after in _SPAWNS.values()}
    ends = sgd(ctx, first, data, steps, "a"), sgd(ctx, perceptron(ctx, "second"), data, steps, "b")
    pairs = {"independent": (ends[0], ends[1])}
    for arm, after in _SPAWNS.items():
        one, other = (sgd(ctx, trunk[after], data, steps, f"{arm} {half}") for half in ("left", "right"))
        pairs[arm] = one, other
        found = ridge(trunk[after], one, other, batches)
        ctx.measure(arm, cosine=found.cosine, height=found.height)
    pairs["unshared 300"] = pairs["spawn 300"][0], ends[1]
    graph = PermutationGraph.of(ends[0], data.train_x[:2])
    copied = permuted(ends[0], graph, graph.random(seed=ctx.seed))
    matching = weight_matching(ends[0], copied, graph)
    pairs["permuted"] = ends[0], copied
    pairs["permuted, matched"] = ends[0], permuted(copied, graph, matching.permutations)
    aligned = weight_matching(ends[0], ends[1], graph)
    pairs["independent, matched"] = ends[0], permuted(ends[1], graph, aligned.permutations)
    whole = line(*pairs["independent"], mean_loss(batches, F.cross_entropy)).barrier
    for arm, (one, other) in pairs.items():
        height = line(one, other, mean_loss(batches, F.cross_entropy)).barrier
        missed = line(one, other, mean_loss(batches, wrong)).barrier
        ctx.measure(arm, barrier=height, accuracy_barrier=missed)
        if whole >= _FLOOR:
            ctx.measure(arm, barrier_ratio=height / whole)


@claim(
    CARD,
    checks=(
        Check.at_least("curvature ranks the barriers of layers", method="curvature", metric="spearman", bound=0.5),
    ),
    sabotage={"next layer": "curvature"},
    seeds=5,
    minutes=1.0,
    data=("fashion-mnist",),
)  # fmt: skip
def curvature_ranks_layers(ctx: Ctx) -> None:
    """The curvature at three places of a line on which one layer moves ranks the barriers of the layers.

    The networks of the first claim: two independent runs, and two runs of one start with batches in other orders. For
    both pairs the four layers move one at a time, the rest at either network; Spearman's correlation of the highest
    gaps measured at 11 points and estimated, mean of the two pairs, on 1,000 training images. Sabotage: each layer
    gets the estimate of the next. Random directions of the same length in each layer stand beside it without a bound:
    they tell how much of the ranking is the layers' lengths alone.
    """
    data = pooled(ctx.data("fashion-mnist", train=6000, test=10))
    steps = ctx.scaled(2000, 200)
    ctx.plan(3 * steps)
    batch = (data.train_x[:1000], data.train_y[:1000])
    first = sgd(ctx, perceptron(ctx, "first"), data, steps, "a")
    others = [sgd(ctx, perceptron(ctx, start), data, steps, "b") for start in ("second", "first")]
    arms: dict[str, list[float]] = {}
    for number, other in enumerate(others):
        barriers, middle = (layer_barriers(first, other, batch, nodes=nodes) for nodes in (3, 1))
        strayed = [elsewhere(ctx, a, b, f"direction {number}") for a, b in ((first, other), (other, first))]
        guesses = [[float(curvature_gaps(*ends, batch, parameters=[name])[1:-1].max()) for ends in strayed]
                   for name in barriers.names]  # fmt: skip
        for arm, estimated in (
            ("curvature", barriers.estimated),
            ("middle alone", middle.estimated),
            ("next layer", barriers.estimated.roll(1, 0)),
            ("random directions", torch.tensor(guesses)),
        ):
            arms.setdefault(arm, []).append(replace(barriers, estimated=estimated).rank_correlation)
    for arm, values in arms.items():
        ctx.measure(arm, spearman=sum(values) / len(values), independent=values[0], one_start=values[1])
