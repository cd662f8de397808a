"""Convergent learning: which units of one network have a partner in another, and which subspaces they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from nervure._kit import BadData, UsageError
from nervure.core.features import features, layers, units
from nervure.core.graph import as_batches
from nervure.core.permutation import PermutationGraph, permuted
from nervure.core.similarity import Moments
from nervure.core.sparse_maps import joint_clusters, lasso
from nervure.inspect._connectivity_trial import held_out, perceptron, pooled, sgd
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="convergent-learning",
    n=40,
    title="Convergent Learning: Do different neural networks learn the same representations?",
    year=2015,
    link="https://arxiv.org/abs/1511.07543",
    family="inspect",
    summary=(
        "Units of two networks are paired by the correlation of their activations: one to one, each with its best "
        "match, by sparse prediction from several, and by clusters of both. Many units have a partner, some have none, "
        "and the subspaces the layers span are closer than their single units."
    ),
    tags=("representation similarity", "matching", "correlation", "sparse prediction", "spectral clustering"),
    provides=("match_units", "compare_units", "ConvergentLearning", "UnitMatch"),
    protocol="diagnostic",
    claims=("trained_units_converge",),
    needs=("data",),
    deviations=(
        "Mutual information is not computed: the paper's bins are not known, and its ranking was that of correlation.",
        "The sparse maps are solved from covariances for all units at once, not unit by unit from samples.",
        "The claim uses perceptrons on pooled Fashion-MNIST in place of AlexNet on ImageNet.",
    ),
    verified=(
        "Streaming correlations equal numpy.corrcoef to 1e-8 at means of a million.",
        "Sparse maps equal sklearn.linear_model.Lasso to 1e-5; clusters are those of a planted partition.",
        "A permuted copy is matched with correlation 1 and the right permutation on every kind of layer.",
    ),
)


@dataclass(frozen=True)
class UnitMatch:
    """Hold how the units of a layer of one network relate to those of a layer of another.

    Units that do not vary are left out of everything but the numbers of units.

    Args:
        layers: The two layers.
        units: Their numbers of units.
        correlations: Of each unit of the first with each of the second; 0 for a unit that does not vary.
        partner: For each unit of the first, its partner in the one-to-one matching of largest total correlation; -1
            where there is none.
        matched: Correlations of the partners, shape (pairs,).
        best: The highest correlation of each unit of the first that varies with any of the second.
        chance: Mean correlation of the best one-to-one matching when the samples of the second are out of step.
        subspace: Mean correlation of the units of the second that vary with their best linear predictions from the
            first, corrected for the number of predictors.
        sources: For each unit of the second, how many units of the first its sparse prediction takes.
        explained: Share of each unit's variance the sparse prediction explains.
        clusters: For each unit of the first, then of the second, its cluster in the joint correlation graph; -1 for one
            that does not vary. Empty without clusters.
        spectrum: Eigenvalues of the graph's normalised Laplacian, rising: as many near 0 as there are loose clusters.
        samples: Number of samples, positions included.
    """

    layers: tuple[str, str]
    units: tuple[int, int]
    correlations: Tensor
    partner: Tensor
    matched: Tensor
    best: Tensor
    chance: float
    subspace: float
    sources: Tensor
    explained: Tensor
    clusters: Tensor
    spectrum: Tensor
    samples: int

    @property
    def mean(self) -> float:
        """The mean correlation of partners."""
        return float(self.matched.mean()) if len(self.matched) else 0.0

    def share_above(self, bound: float = 0.7) -> float:
        """Return the share of pairs that correlate more than a bound.

        Args:
            bound: The bound.

        Returns:
            The share.
        """
        return float((self.matched > bound).double().mean()) if len(self.matched) else 0.0

    @property
    def shared_matches(self) -> float:
        """How much higher the best matches are than the partners on average: where several units want one."""
        return float(self.best.mean()) - self.mean if len(self.best) else 0.0


@dataclass(frozen=True)
class ConvergentLearning:
    """Hold the matches of all compared layers.

    Args:
        matches: Layer of the first network -> match.
        margin: How far above chance the mean correlation of partners counts as shared.
    """

    matches: Mapping[str, UnitMatch]
    margin: float

    @property
    def verdict(self) -> str:
        """Return "ok" where units of every layer share more than chance does, "warn" where those of one do not.

        It cannot be told where a layer has fewer samples than ten times its units, where any matching looks good.
        """
        if any(one.samples < 10 * max(one.units) or not len(one.matched) for one in self.matches.values()):
            return "cannot tell"
        return "ok" if all(one.mean - one.chance >= self.margin for one in self.matches.values()) else "warn"


def match_units(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    other: nn.Module,
    names: Sequence[str] | Mapping[str, str] | None = None,
    penalty: float = 0.05,
    clusters: int = 8,
    margin: float = 0.1,
    seed: int = 0,
) -> ConvergentLearning:
    """Match the units of two networks, layer by layer, by the activations on common samples.

    Correlations are taken in one pass; memory is the square of the widths. A unit is a channel of a convolution or the
    last axis of anything else; every position is a sample. The sparse map of a unit y from the units x minimises
    |y - w'x|^2 / 2 + penalty |w|_1 on standardised units.

    Args:
        model: A network, left as it is; it is run in eval mode.
        batches: One batch (inputs, targets) or a sequence of batches; targets are not looked at and may be None.
        other: The network it is compared with, of any width, left as it is.
        names: Layers, or layer of the model -> layer of the other; None takes every layer both have by name.
        penalty: Weight of the sparse map's L1 norm, above 0, in units of a correlation.
        clusters: Number of clusters of the joint correlation graph; 0 makes none.
        margin: How far above chance the mean correlation of partners counts as shared.
        seed: Draws the clusters' starts.

    Returns:
        The matches; the verdict is "cannot tell" for too few samples.

    Raises:
        UsageError: If there is no common layer, or the penalty is not positive.
        BadData: If a layer gives another number of samples in the two networks.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> graph = PermutationGraph.of(net, torch.ones(1, 3))
        >>> other = permuted(net, graph, {0: torch.arange(8).flip(0)})
        >>> found = match_units(net, (torch.randn(200, 3), None), other=other)
        >>> found.matches["0"].partner.tolist()
        [7, 6, 5, 4, 3, 2, 1, 0]
    """
    if penalty <= 0:
        raise UsageError("a sparse map needs a penalty", expected="above 0", found=penalty)
    alone = isinstance(batches, tuple) and len(batches) == 2 and batches[1] is None
    every = [batches[0]] if alone else [inputs for inputs, _ in as_batches(batches)]
    pairs = _pairs(model, other, names, every[0])
    seen = {name: (Moments(), Moments()) for name in pairs}
    modules = [dict(one.named_modules()) for one in (model, other)]
    for inputs in every:
        found = [features(model, inputs, pairs), features(other, inputs, pairs.values())]
        for name, (together, apart) in seen.items():
            sides = [found[0][name], found[1][pairs[name]]]
            # Out of step by one sample: what correlates still is chance.
            late = [call.roll(1, 0) for call in sides[1]]
            x, y, z = (
                units(calls, held[key])
                for calls, held, key in zip(
                    [*sides, late], [*modules, modules[1]], [name, pairs[name], pairs[name]], strict=True
                )
            )
            if len(x) != len(y):
                raise BadData(f"{name} has another number of samples in the other network", found=(len(x), len(y)))
            together.update(x, y)
            apart.update(x, z)
    matches = {
        name: _match((name, pairs[name]), *both, penalty=penalty, clusters=clusters, seed=seed)
        for name, both in seen.items()
    }
    return ConvergentLearning(matches, margin)


def compare_units(x: Tensor, y: Tensor, *, penalty: float = 0.05, clusters: int = 8, seed: int = 0) -> UnitMatch:
    """Match units by activations at hand; see `match_units`.

    Args:
        x: Units of one network on some samples, shape (N, P).
        y: Units of another on the same samples, shape (N, Q).
        penalty: As in `match_units`.
        clusters: As in `match_units`.
        seed: As in `match_units`.

    Returns:
        The match.
    """
    together, apart = Moments(), Moments()
    together.update(x, y)
    apart.update(x, y.roll(1, 0))
    return _match(("", ""), together, apart, penalty=penalty, clusters=clusters, seed=seed)


def _pairs(
    model: nn.Module, other: nn.Module, names: Sequence[str] | Mapping[str, str] | None, inputs: Any
) -> dict[str, str]:
    mine, theirs = layers(model, inputs), layers(other, inputs)
    if names is None:
        names = [name for name in mine if name in theirs]
    pairs = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    missing = [name for name in pairs if name not in mine] + [name for name in pairs.values() if name not in theirs]
    if missing or not pairs:
        found = ", ".join(missing) or "none in common"
        raise UsageError("there is no such layer", expected=f"of {mine} and {theirs}", found=found)
    return pairs


def _match(
    names: tuple[str, str], together: Moments, apart: Moments, *, penalty: float, clusters: int, seed: int
) -> UnitMatch:
    one, two, _ = together.covariances()
    alive = [one.diagonal() > 0, two.diagonal() > 0]
    among = [_correlation(covariance, kept) for covariance, kept in zip((one, two), alive, strict=True)]
    both = together.correlations().nan_to_num()
    cross = both[alive[0]][:, alive[1]]
    rows, columns = linear_sum_assignment(cross.numpy(), maximize=True)
    places = [kept.nonzero().squeeze(1) for kept in alive]
    partner = torch.full((len(one),), -1)
    partner[places[0][torch.from_numpy(rows)]] = places[1][torch.from_numpy(columns)]
    late = apart.correlations().nan_to_num()[alive[0]][:, alive[1]]
    weights, explained = lasso(among[0], cross, penalty)
    labels = torch.full((len(one) + len(two),), -1) if clusters else torch.empty(0, dtype=torch.long)
    spectrum = torch.empty(0, dtype=torch.float64)
    if clusters and cross.numel():
        graph = torch.cat([torch.cat([among[0], cross], 1), torch.cat([cross.T, among[1]], 1)]).abs()
        found, spectrum = joint_clusters(graph, clusters, seed=seed)
        labels[torch.cat(alive).nonzero().squeeze(1)] = found
    return UnitMatch(
        layers=names,
        units=(len(one), len(two)),
        correlations=both,
        partner=partner,
        matched=cross[rows, columns],
        best=cross.amax(1) if cross.numel() else torch.empty(0, dtype=torch.float64),
        chance=float(late[linear_sum_assignment(late.numpy(), maximize=True)].mean()) if late.numel() else 0.0,
        subspace=_subspace(among[0], cross, together.count),
        sources=(weights != 0).sum(0),
        explained=explained,
        clusters=labels,
        spectrum=spectrum,
        samples=together.count,
    )


def _correlation(covariance: Tensor, kept: Tensor) -> Tensor:
    inside = covariance[kept][:, kept]
    scale = inside.diagonal().sqrt()
    return inside / torch.outer(scale, scale)


def _subspace(among: Tensor, cross: Tensor, samples: int) -> float:
    """Return the mean multiple correlation, R^2 corrected for the number of predictors."""
    if not cross.numel():
        return 0.0
    values, vectors = torch.linalg.eigh(among)
    real = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    squared = ((vectors[:, real].T @ cross).square() / values[real, None]).sum(0)
    left = max(1, samples - 1 - int(real.sum()))
    corrected = 1 - (1 - squared) * (samples - 1) / left
    return float(corrected.clamp(0, 1).sqrt().mean())


_LAYERS = ("layers.0", "layers.1")


@claim(
    CARD,
    checks=(
        *(Check(name=f"trained match better than untrained, layer {k}", method="trained", control="untrained",
                metric=f"matched_{k}", margin=0.1) for k in (1, 2)),
        *(Check.at_least(f"the subspace is closer than the units, layer {k}", method="trained",
                         metric=f"subspace_above_{k}", bound=0.0) for k in (1, 2)),
        *(Check.at_most(f"samples out of step do not match, layer {k}", method="shuffled", metric=f"matched_{k}",
                        bound=0.1) for k in (1, 2)),
        *(Check.at_least(f"a permuted copy matches entirely, layer {k}", method="permuted copy", metric=f"least_{k}",
                         bound=1 - 1e-6, rule="every-seed") for k in (1, 2)),
        *(Check.at_least(f"and in the right order, layer {k}", method="permuted copy", metric=f"right_{k}", bound=1.0,
                         rule="every-seed") for k in (1, 2)),
    ),
    sabotage={"shuffled": "trained"},
    seeds=5,
    minutes=1.0,
    data=("fashion-mnist",),
)  # fmt: skip
def trained_units_converge(ctx: Ctx) -> None:
    """Units of two trained networks match better, by 0.1, than those of a trained and an untrained one.

    Perceptrons 196-64-64-10 on 6,000 pooled Fashion-MNIST images, 1,500 steps of SGD at 0.05 with momentum 0.9. The
    units of both hidden layers, before the ReLU, are matched on 2,000 probe images; how far the best linear map of a
    layer is above the partners is measured on 2,000 others. Shuffled: the second network's samples are out of step by
    one. The shares of pairs above 0.7 and below 0.3 are measured without a bound.
    """
    data = pooled(ctx.data("fashion-mnist", train=6000, test=4000))
    steps = ctx.scaled(1500, 150)
    ctx.plan(2 * steps)
    first, second = (sgd(ctx, perceptron(ctx, tag, (64, 64)), data, steps, tag) for tag in ("a", "b"))
    graph = PermutationGraph.of(first, data.test_x[:2])
    order = graph.random(seed=ctx.seed)
    seen = {
        name: features(model, data.test_x, _LAYERS)
        for name, model in (("first", first), ("trained", second), ("untrained", perceptron(ctx, "c", (64, 64))),
                            ("permuted copy", permuted(first, graph, order)))
    }  # fmt: skip
    seen["shuffled"] = {name: [call.roll(1, 0) for call in calls] for name, calls in seen["trained"].items()}
    for arm in ("trained", "untrained", "shuffled", "permuted copy"):
        for k, name in enumerate(_LAYERS, 1):
            x, y = seen["first"][name][0], seen[arm][name][0]
            found = compare_units(x[:2000], y[:2000], clusters=0)
            partners, linear = held_out(x[2000:], y[2000:], found.partner)
            ctx.measure(arm, **{f"matched_{k}": found.mean, f"subspace_above_{k}": linear - partners})
            ctx.measure(arm, **{f"above_{k}": found.share_above(0.7), f"below_{k}": 1 - found.share_above(0.3)})
            if arm == "permuted copy":
                right = (order[k - 1][found.partner] == torch.arange(64)).double().mean()
                ctx.measure(arm, **{f"least_{k}": float(found.matched.min()), f"right_{k}": float(right)})
