"""Class-distance normalised variance: how far the classes stand apart in a layer, and what new classes gain by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nervure._kit import BadData
from nervure.core.class_moments import ClassMoments, DealtMoments, Estimate
from nervure.core.graph import as_batches
from nervure.core.readout import Kind, Readout, few_shot
from nervure.inspect._filter_trial import pooled
from nervure.inspect._labelled import LAST, labelled
from nervure.inspect._transfer_trial import Extractor, fit
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="cdnv-transfer",
    n=289,
    title="On the Role of Neural Collapse in Transfer Learning",
    year=2022,
    link="https://arxiv.org/abs/2112.15121",
    family="inspect",
    summary=(
        "The variance of two classes over the squared distance of their means tells how far features have collapsed. "
        "Small on training classes, it is small on new samples of them, and with many training classes on new classes "
        "too, where a nearest-mean classifier then needs few samples."
    ),
    tags=("neural collapse", "transfer", "few-shot", "class separability", "class means", "audit"),
    provides=("class_separability", "ClassSeparability", "LayerSeparability", "episodes_accuracy"),
    protocol="diagnostic",
    claims=("more_classes_serve_new_classes",),
    needs=("data", "labels"),
    deviations=(
        "The distance of two means is that of the samples: noise lengthens it, and few samples make the ratio small.",
        "Ten classes in all; the published accuracies of few-shot benchmarks are not reproduced.",
    ),
    verified=(
        "Gaussian classes: the closed form within three standard errors, and the error of nearest means.",
        "Streaming equals two passes over all samples to 1e-9.",
    ),
)


@dataclass(frozen=True)
class LayerSeparability:
    """Hold how far the classes of one layer stand apart.

    Args:
        labels: The classes, C of them.
        pairs: (Var_1 + Var_2) / (2 |mu_1 - mu_2|^2) of all pairs, shape (C, C), zero on the diagonal.
        mean: Over the pairs.
        nearest: The two labels whose ratio is largest.
        worst: Their ratio; being the largest of many it tends to be too large.
        fewest: Samples of the smallest class.
    """

    labels: tuple[int, ...]
    pairs: Tensor
    mean: Estimate
    nearest: tuple[int, int]
    worst: Estimate
    fewest: int

    @property
    def verdict(self) -> str:
        """Return "warn" where the worst pair is surely above 1, "ok" where surely not, else "cannot tell".

        Above 1 the samples of two classes lie further from their means than these from each other. Below ten samples
        of a class nothing is told.
        """
        low, high = self.worst.interval
        if self.fewest < 10 or not math.isfinite(low) or low <= 1 <= high:
            return "cannot tell"
        return "warn" if low > 1 else "ok"


@dataclass(frozen=True)
class ClassSeparability:
    """Report how far the classes stand apart.

    Args:
        layers: Layer -> its numbers; "features" are the inputs of the last linear layer.
    """

    layers: Mapping[str, LayerSeparability]

    @property
    def verdict(self) -> str:
        """Return that of the last layer: earlier ones need not separate the classes."""
        return list(self.layers.values())[-1].verdict


def class_separability(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    layers: Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    groups: int = 10,
    seed: int = 0,
) -> ClassSeparability:
    """Measure (Var_1 + Var_2) / (2 |mu_1 - mu_2|^2) of every two classes, Var being the mean |f - mu|^2.

    One pass over the batches; memory is groups x classes x width, whatever the number of samples. Errors are those of
    leaving out groups of samples.

    Args:
        model: A classifier; the classes measured need not be those it was trained on.
        batches: One batch (inputs, class numbers) or a sequence of batches.
        layers: Names of modules whose outputs are measured, in the model's order; None takes the inputs of the last
            linear layer.
        classes: Labels that count; None takes all.
        groups: How many groups the samples of a class are dealt to, at least 2.
        seed: Without effect: nothing is drawn.

    Returns:
        The report. Where two classes have equal means the ratio is infinite and the verdict "cannot tell".

    Raises:
        BadData: If there are samples of fewer than two classes.

    Examples:
        >>> x = torch.eye(3).repeat(20, 1) + 0.1 * torch.randn(60, 3)
        >>> found = class_separability(nn.Linear(3, 3), (x, torch.arange(3).repeat(20)))
        >>> found.layers["features"].mean.value < 0.1, found.verdict
        (True, 'ok')
    """
    seen: dict[str, DealtMoments] = {}
    for part in labelled(model, as_batches(batches), layers, method="class separability"):
        labels = part.labels
        if classes is not None:
            labels = torch.where(torch.isin(labels, torch.tensor(list(classes), device=labels.device)), labels, -1)
        for name, rows in part.rows.items():
            seen.setdefault(name, DealtMoments(groups=groups)).update(rows, labels)
    if not seen or any(len(dealt.merged().labels) < 2 for dealt in seen.values()):
        raise BadData("there is one class alone", expected="samples of two classes or more")
    return ClassSeparability({name: _layer(dealt) for name, dealt in seen.items()})


def _layer(dealt: DealtMoments) -> LayerSeparability:
    whole = dealt.merged()
    pairs = pair_ratios(whole)
    count = len(pairs)
    one, two = divmod(int(pairs.argmax()), count)
    nearest = (int(whole.labels[one]), int(whole.labels[two]))

    def numbers(moments: ClassMoments) -> list[float]:
        ratios, known = pair_ratios(moments), moments.labels.tolist()
        mean = float(ratios.sum()) / max(1, len(ratios) * (len(ratios) - 1))
        both = all(label in known for label in nearest)
        return [mean, float(ratios[known.index(nearest[0]), known.index(nearest[1])]) if both else math.nan]

    mean, worst = dealt.estimates(numbers)
    return LayerSeparability(tuple(whole.labels.tolist()), pairs, mean, nearest, worst, int(whole.counts.min()))


def pair_ratios(moments: ClassMoments) -> Tensor:
    """Return the class-distance normalised variance of all pairs.

    Args:
        moments: Of C classes.

    Returns:
        Shape (C, C), zero on the diagonal; infinite where two means are equal.
    """
    # Differences, not inner products: means may be far from zero and near to each other.
    apart = torch.cdist(moments.means, moments.means, compute_mode="donot_use_mm_for_euclid_dist").square()
    sums = moments.variances[:, None] + moments.variances
    return torch.where(apart > 0, sums / (2 * apart), math.inf).fill_diagonal_(0)


def episodes_accuracy(
    features: Tensor,
    labels: Tensor,
    *,
    head: Kind = "nearest-mean",
    ways: int = 2,
    shots: int = 3,
    episodes: int = 500,
    seed: int = 0,
) -> Estimate:
    """Return the mean accuracy of few-shot episodes on fixed features.

    An episode draws `ways` classes and `shots` samples of each to fit a head; every other sample of these classes is a
    question, all classes counting alike.

    Args:
        features: Shape (N, ...).
        labels: Classes, shape (N,).
        head: The kind of `nervure.core.readout.Readout`.
        ways: Classes of an episode, at least 2.
        shots: Samples a class, at least 1.
        episodes: How many, at least 2.
        seed: Draws them.

    Returns:
        The mean; its error is over episodes, which share samples, and understates that over new classes.

    Examples:
        >>> x, y = torch.eye(2).repeat(6, 1), torch.arange(2).repeat(6)
        >>> episodes_accuracy(x, y, head="ridge", episodes=4).value
        1.0
    """
    if head == "nearest-mean":
        found = few_shot(features, labels, ways=ways, shots=shots, episodes=episodes, seed=seed)
    else:
        few_shot(features, labels, ways=ways, shots=shots, episodes=1, seed=seed)  # refuses what cannot be drawn
        draw = torch.Generator().manual_seed(seed)
        places = [(labels.cpu() == c).nonzero().squeeze(1) for c in labels.unique().cpu()]
        rows, truth = features.detach().cpu().flatten(1), labels.cpu()
        found = torch.tensor([_episode(rows, truth, places, head, ways, shots, draw) for _ in range(episodes)])
    error = float(found.double().std() / math.sqrt(len(found))) if len(found) > 1 else None
    return Estimate(float(found.double().mean()), error, max(1, len(found) - 1))


def _episode(
    rows: Tensor, labels: Tensor, places: list[Tensor], head: Kind, ways: int, shots: int, draw: torch.Generator
) -> float:
    chosen = torch.randperm(len(places), generator=draw)[:ways].tolist()
    orders = [places[c][torch.randperm(len(places[c]), generator=draw)] for c in chosen]
    known = torch.cat([order[:shots] for order in orders])
    fitted = Readout(rows[known], labels[known], kind=head)
    return sum(fitted.accuracy(rows[order[shots:]], labels[order[shots:]]) for order in orders) / ways


_UNSEEN = (7, 8, 9)


@claim(
    CARD,
    checks=(
        Check.at_most("new classes: below 0.8 of random features", method="seven classes", metric="of_random",
                      bound=0.8),
        Check(name="new classes: below two training classes", method="seven classes", control="two classes",
              metric="unseen", better="lower"),
        Check(name="few-shot accuracy rises with the classes", method="seven classes", control="two classes",
              metric="few_shot"),
        Check(name="held-out samples: below random features", method="seven classes", control="random features",
              metric="held_out", better="lower"),
    ),
    sabotage={"shuffled labels": "seven classes", "random features": "seven classes"},
    seeds=5,
    minutes=3.0,
    data=("fashion-mnist",),
)  # fmt: skip
def more_classes_serve_new_classes(ctx: Ctx) -> None:
    """With seven training classes the variance ratio of unseen ones falls below random features', accuracy rises.

    Fashion-MNIST at 14 x 14, ReLU perceptron 196-256-256-128, 500 steps of Adam on the first two, four or seven
    classes; the last three are never trained on and asked in 3-shot 2-way episodes of nearest means. The controls are
    untrained features, and seven classes with shuffled labels.
    """
    data = ctx.data("fashion-mnist", train=12000, test=4000)
    x, y = pooled(data.train_x).flatten(1), data.train_y
    test, truth = pooled(data.test_x).flatten(1), data.test_y
    arms = {"random features": 7, "two classes": 2, "four classes": 4, "seven classes": 7, "shuffled labels": 7}
    reference = math.nan
    for number, (arm, classes) in enumerate(arms.items()):
        own = y < classes
        labels = y[own]
        if arm == "shuffled labels":
            labels = labels[torch.randperm(len(labels), generator=ctx.generator("shuffled"))]
        model = Extractor(classes, ctx.generator("weights"))
        if arm != "random features":
            fit(ctx, model, x[own], labels, steps=ctx.scaled(500, 50))
        seen, held_out = (
            class_separability(model, batch, classes=range(classes)).layers[LAST].mean.value
            for batch in ((x[own], labels), (test, truth))
        )
        unseen = class_separability(model, (test, truth), classes=_UNSEEN).layers[LAST].mean.value
        reference = unseen if arm == "random features" else reference
        new = torch.isin(truth, torch.tensor(_UNSEEN))
        rows = next(labelled(model, [(test[new], truth[new])], None, method="claim")).rows[LAST]
        shots = episodes_accuracy(rows, truth[new], seed=ctx.seed_for("episodes"))
        ctx.measure(
            arm, train=seen, held_out=held_out, unseen=unseen, of_random=unseen / reference, few_shot=shots.value,
            few_shot_error=shots.error or 0.0,
        )  # fmt: skip
        ctx.progress(number + 1, len(arms), arm)
