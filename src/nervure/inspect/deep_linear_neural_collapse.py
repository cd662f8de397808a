"""Neural collapse: how near a layer's class means are to a frame, and the frame that weight decay leads to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure._kit import BadData, UsageError
from nervure.core.class_moments import ClassMoments, DealtMoments, Estimate
from nervure.core.graph import as_batches
from nervure.inspect._collapse_trial import DeepHead, free_features, imbalanced, trained
from nervure.inspect._frames import duality, mean_cosine, simplex_distance, variability
from nervure.inspect._labelled import labelled
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="deep-linear-neural-collapse",
    n=13,
    title="Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data",
    year=2023,
    link="https://arxiv.org/abs/2301.00437",
    family="inspect",
    summary=(
        "Weight decay drives a linear network on free features to one exact shape: the samples of a class fall "
        "together, the classes stand at right angles, and each has a length that its number of samples sets. Below a "
        "threshold a class vanishes. The same numbers tell how far any layer of a trained network has collapsed."
    ),
    tags=("neural collapse", "class means", "frame", "imbalance", "minority collapse", "linear networks", "audit"),
    provides=("neural_collapse", "NeuralCollapse", "LayerCollapse", "predicted_geometry", "FrameGeometry"),
    protocol="diagnostic",
    claims=("the_predicted_geometry_is_reached", "layers_collapse_on_digits"),
    needs=("data", "labels"),
    deviations=(
        "The exact solution is that of squared errors without biases; for cross entropy only the simplex frame is "
        "measured.",
        "The variability within the classes is averaged over samples, that between them over classes.",
        "Networks on image data are replaced by a perceptron with a deep linear head on digits.",
        "On digits four set-ups were looked at on one seed, of which gradient descent diverged in two, before this "
        "one was kept; half of the training counts as its middle.",
    ),
    verified=(
        "All numbers against full covariances and numpy's pseudo-inverse in float64.",
        "The closed form against L-BFGS on the whole problem, and against a grid over the scalar one.",
    ),
)


@dataclass(frozen=True)
class LayerCollapse:
    """Hold the numbers of one layer; each is 0 in the collapsed limit.

    Args:
        variability: tr(S_W S_B^+) / C, the scatter within the classes over that between them (NC1).
        simplex: Frobenius distance of the Gram matrix of the centred class means, of norm one, from that of a simplex
            frame (NC2).
        orthogonality: Root mean square cosine between the class means, not centred: 0 for any orthogonal frame.
        duality: 2 - 2 cos between the matrices of centred means and of class weights (NC3); None where the layer has
            other features than the last linear layer's inputs.
        disagreement: Share of samples to which the nearest class mean and the network give different classes (NC4).
        lengths: Label -> length of the class mean, not centred.
        lost: Labels of classes no more to be told apart: the centred mean is shorter than a tenth of the longest, or
            within an angle of cosine 0.9 of another one's.
        fewest: Samples of the smallest class.
    """

    variability: Estimate
    simplex: Estimate
    orthogonality: Estimate
    duality: Estimate | None
    disagreement: Estimate
    lengths: Mapping[int, float]
    lost: tuple[int, ...]
    fewest: int

    @property
    def verdict(self) -> str:
        """Return "warn" where classes are lost, "ok" where not, "cannot tell" on fewer than ten samples a class."""
        if self.fewest < 10 or not math.isfinite(self.variability.value):
            return "cannot tell"
        return "warn" if self.lost else "ok"


@dataclass(frozen=True)
class NeuralCollapse:
    """Report how far layers have collapsed.

    Args:
        layers: Layer -> its numbers; "features" are the inputs of the last linear layer.
    """

    layers: Mapping[str, LayerCollapse]

    @property
    def verdict(self) -> str:
        """Return that of the last layer: earlier ones need not separate the classes."""
        return list(self.layers.values())[-1].verdict


def neural_collapse(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    layers: Sequence[str] | None = None,
    groups: int = 10,
    seed: int = 0,
) -> NeuralCollapse:
    """Measure the neural collapse of layers, each number with an error by leaving out groups of samples.

    Two passes over the batches: the first takes class means, the second the scatter along the space they span, which
    is all that tr(S_W S_B^+) sees. Memory is groups x classes x width, whatever the number of samples.

    Args:
        model: A classifier.
        batches: One batch (inputs, class numbers) or a sequence of batches, the same at every pass.
        layers: Names of modules whose outputs are measured, in the model's order; None takes the inputs of the last
            linear layer.
        groups: How many groups the samples of a class are dealt to, at least 2.
        seed: Without effect: nothing is drawn.

    Returns:
        The report. Where all class means are equal the variability is infinite and the verdict "cannot tell".

    Raises:
        BadData: If there are samples of fewer than two classes.

    Examples:
        >>> x = torch.eye(3).repeat(20, 1) + 0.01 * torch.randn(60, 3)
        >>> model = nn.Linear(3, 3)
        >>> found = neural_collapse(model, (x, torch.arange(3).repeat(20))).layers["features"]
        >>> found.variability.value < 0.01, found.orthogonality.value < 0.05
        (True, True)
    """
    every = as_batches(batches)
    first: dict[str, DealtMoments] = {}
    weight = None
    for seen in labelled(model, every, layers, method="neural collapse"):
        weight = seen.weight
        for name, rows in seen.rows.items():
            first.setdefault(name, DealtMoments(groups=groups)).update(rows, seen.labels)
    if not first or any(len(dealt.merged().labels) < 2 for dealt in first.values()):
        raise BadData("there is one class alone", expected="samples of two classes or more")
    spans = {name: _span(dealt) for name, dealt in first.items()}
    second = {name: DealtMoments(groups=groups, covariance=True) for name in first}
    means = {name: dealt.merged() for name, dealt in first.items()}
    wrong = {name: [0, 0] for name in first}
    for seen in labelled(model, every, layers, method="neural collapse"):
        for name, rows in seen.rows.items():
            known = seen.labels >= 0
            along = rows.double() @ spans[name]
            second[name].update(along, seen.labels)
            nearest = torch.cdist(along[known], means[name].means @ spans[name]).argmin(1)
            different = means[name].labels[nearest] != seen.decisions[known]
            wrong[name][0] += int(different.sum())
            wrong[name][1] += len(different)
    return NeuralCollapse(
        {
            name: _layer(dealt, means[name], wrong[name], None if weight is None else (weight.double(), spans[name]))
            for name, dealt in second.items()
        }
    )


def _span(dealt: DealtMoments) -> Tensor:
    """Return orthonormal columns that span the class means of all groups, and so those of any left-out sample."""
    means = torch.cat([part.means for part in dealt.parts if len(part.labels)])
    if len(means) >= means.shape[1]:
        return torch.eye(means.shape[1], dtype=means.dtype, device=means.device)
    return torch.linalg.qr(means.T)[0]


def _layer(
    dealt: DealtMoments, whole: ClassMoments, wrong: Sequence[int], head: tuple[Tensor, Tensor] | None
) -> LayerCollapse:
    def numbers(moments: ClassMoments) -> list[float]:
        found = [variability(moments), simplex_distance(moments.centred()), mean_cosine(moments.means)]
        return found if head is None else [*found, duality(moments, *head)]

    one, two, three, *rest = dealt.estimates(numbers)
    share = wrong[0] / wrong[1]
    return LayerCollapse(
        variability=one,
        simplex=two,
        orthogonality=three,
        duality=rest[0] if rest else None,
        disagreement=Estimate(share, math.sqrt(share * (1 - share) / wrong[1]), max(1, wrong[1] - 1)),
        lengths=dict(zip(whole.labels.tolist(), whole.means.norm(dim=1).tolist(), strict=True)),
        lost=tuple(whole.labels[_lost(whole.centred())].tolist()),
        fewest=int(whole.counts.min()),
    )


def _lost(centred: Tensor) -> Tensor:
    lengths = centred.norm(dim=1)
    rows = F.normalize(centred)
    beside = (rows @ rows.T).fill_diagonal_(0).amax(1) > 0.9
    return beside | (lengths < 0.1 * lengths.max())


@dataclass(frozen=True)
class FrameGeometry:
    """Hold the global minimum of a deep linear network on free features.

    Args:
        outputs: What the network says of each class's samples for their own class, shape (C,); 0 where it vanishes.
        feature_lengths: Length of each class's features, which are at right angles.
        singular_values: Those of each weight matrix, shape (M, C).
    """

    outputs: Tensor
    feature_lengths: Tensor
    singular_values: Tensor


def predicted_geometry(counts: Sequence[int], *, weight_decays: Sequence[float], feature_decay: float) -> FrameGeometry:
    """Solve min 1/(2N) |W_M ... W_1 H - Y|^2 + sum_i lw_i/2 |W_i|^2 + lh/2 |H|^2 over weights and features exactly.

    Classes do not interact: each minimises n_k/(2N) (s - 1)^2 + (M + 1)/2 (prod lw_i lh n_k s^2)^(1/(M + 1)) over its
    output s. Zero is always a local minimum from two layers on; the other one, where there is one, is compared with
    it.

    Args:
        counts: Samples of each class, at least 1; every layer is at least as wide as there are classes.
        weight_decays: lw_1 to lw_M, above 0.
        feature_decay: lh, above 0.

    Returns:
        The geometry.

    Raises:
        UsageError: If a number is out of range.

    Examples:
        >>> predicted_geometry([80, 10], weight_decays=[5e-4] * 3, feature_decay=0.3).outputs.round(decimals=2)
        tensor([0.9900, 0.9600], dtype=torch.float64)
    """
    n = torch.tensor(list(counts), dtype=torch.float64)
    rates = torch.tensor(list(weight_decays), dtype=torch.float64)
    if not len(n) or not len(rates) or float(n.min()) < 1 or float(rates.min()) <= 0 or feature_decay <= 0:
        raise UsageError(
            "no such problem", expected="counts >= 1, decays > 0", found=(counts, weight_decays, feature_decay)
        )
    power = 1 / (len(rates) + 1)
    strength = (rates.prod() * feature_decay * n) ** power
    share = n / n.sum()
    # Where the slope is zero, (1 - s) s^(1 - 2 power) = strength / share; the left side falls from its top to s = 1.
    low = torch.full_like(n, (1 - 2 * power) / (2 - 2 * power))
    high = torch.ones_like(n)
    for _ in range(60):
        middle = (low + high) / 2
        above = (1 - middle) * middle ** (1 - 2 * power) > strength / share
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    cost = share / 2 * (low - 1).square() + strength / (2 * power) * low ** (2 * power)
    outputs = torch.where(cost < share / 2, low, 0.0)
    equal = strength * outputs ** (2 * power)  # every factor's penalty is the same
    return FrameGeometry(outputs, (equal / (feature_decay * n)).sqrt(), (equal / rates[:, None]).sqrt())


_COUNTS = (80, 40, 20, 10)
_MILD = ((5e-4,) * 3, 1e-2)
_STRONG = ((0.015,) * 3, 0.015)


@claim(
    CARD,
    checks=(
        Check.at_most("class outputs are the predicted ones", method="decayed", metric="deviation", bound=1e-3),
        Check.at_most("class means are orthogonal", method="decayed", metric="cosine", bound=1e-3),
        Check.at_most("classes below the threshold vanish", method="decayed", metric="threshold_deviation", bound=1e-3),
    ),
    sabotage={"no decay": "decayed", "random features": "decayed"},
    seeds=5,
    minutes=2.0,
)
def the_predicted_geometry_is_reached(ctx: Ctx) -> None:
    """L-BFGS on free features reaches the predicted output of every class, at right angles; small classes vanish.

    Four classes of 80, 40, 20 and 10 samples, three matrices of width 16, in float64. Stronger decay puts the smallest
    class alone below its threshold. The controls have no decay, and features that stay as drawn.
    """
    scales = (1.0, 2.0, 4.0, 8.0)
    none = ((0.0,) * 3, 0.0)
    for arm, mild, strong, frozen in (
        ("decayed", _MILD, _STRONG, False),
        ("no decay", none, none, False),
        ("random features", _MILD, _STRONG, True),
    ):
        found, beyond = (
            free_features(_COUNTS, ctx.generator(arm, rates), weight_decays=rates[0], feature_decay=rates[1],
                          scales=scales if rates == _STRONG else (1.0,), frozen=frozen)
            for rates in (mild, strong)
        )  # fmt: skip
        truth, threshold = (
            predicted_geometry(_COUNTS, weight_decays=rates[0], feature_decay=rates[1]).outputs
            for rates in (_MILD, _STRONG)
        )
        ctx.measure(
            arm,
            deviation=float((found.outputs - truth).abs().max()),
            cosine=mean_cosine(found.means),
            threshold_deviation=float((beyond.outputs - threshold).abs().max()),
            vanished=float((beyond.outputs < 1e-3).sum()),
        )


@claim(
    CARD,
    checks=(
        Check.at_least("variability falls tenfold", method="decayed", metric="fall", bound=10.0),
        Check.at_least("without decay it stays ten times above", method="decayed", metric="below_plain", bound=10.0),
        Check.at_least("imbalanced: variability falls tenfold", method="imbalanced", metric="fall", bound=10.0),
    ),
    sabotage={"no decay": "decayed"},
    seeds=5,
    minutes=5.0,
    data=("digits",),
)
def layers_collapse_on_digits(ctx: Ctx) -> None:
    """With weight decay the variability of the last features falls tenfold in the second half; without it stays.

    1,000 digits, ReLU layers 64-128-128 and three linear ones, squared errors, Adam of rate 0.001 and a cosine
    over 300 epochs, decay 0.0005 in the gradient. Imbalanced, the classes' numbers fall from 100 to 10 in equal
    ratios. The controls have no decay, and stop at a training accuracy of 0.7, whose variability stands beside them.
    """
    data = ctx.data("digits", train=1200)
    x, y = data.train_x.flatten(1), data.train_y
    epochs = ctx.scaled(300, 20)
    few = imbalanced(y, most=100, least=10)
    ends = {}
    for arm, decay, chosen in (
        ("decayed", 5e-4, slice(0, 1000)),
        ("no decay", 0.0, slice(0, 1000)),
        ("imbalanced", 5e-4, few),
    ):
        model, middle, early = DeepHead(data.classes, ctx.generator("weights")), math.nan, None
        for epoch, accuracy in trained(ctx, model, x[chosen], y[chosen], epochs=epochs, decay=decay):
            wanted = epoch in (epochs // 2, epochs) or (early is None and accuracy >= 0.7)
            if not wanted:
                continue
            seen = neural_collapse(model, (x[chosen], y[chosen])).layers["features"]
            value = seen.variability.value
            ctx.measure(arm, step=epoch, variability=value, orthogonality=seen.orthogonality.value, accuracy=accuracy)
            early = value if early is None else early
            middle = value if epoch == epochs // 2 else middle
        ends[arm] = value
        ctx.measure(arm, variability=value, fall=middle / max(value, 1e-300), accuracy=accuracy)
        ctx.measure(f"{arm}, stopped early", variability=early if early is not None else math.nan)
    for arm in ("decayed", "no decay"):
        ctx.measure(arm, below_plain=ends["no decay"] / max(ends[arm], 1e-300))
