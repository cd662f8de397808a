"""What each depth of a network knows: features before a head and behind it, and a head that is not learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor, nn

from nervure._kit import BadData, Unsupported, UsageError
from nervure.core import features, forward
from nervure.core.graph import as_batches, joined
from nervure.core.readout import Kind, Readout, few_shot
from nervure.learn._head_trial import LinearPair, coarse, feature_world, trained
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="projection-head-benefit",
    n=201,
    title="Investigating the Benefits of Projection Head for Representation Learning",
    year=2024,
    link="https://arxiv.org/abs/2403.11391",
    family="inspect",
    summary=(
        "Why features before a projection head transfer better: gradient flow keeps linear layers balanced, so what "
        "the whole map amplifies by s is amplified by the l/L-th power of s after l of L layers, and lower layers "
        "weigh features more equally. A fixed head of falling weights is a substitute that can be controlled."
    ),
    tags=("contrastive", "self-supervised", "linear probe", "transfer", "coarse labels", "implicit bias"),
    provides=("probe_depths", "DepthReport", "Depth", "FixedReweight", "spectral_contrastive", "layer_slopes",
              "imbalance"),
    protocol="diagnostic",
    claims=("encoders_take_square_roots", "coarse_labels_leave_more_before_the_head"),
    needs=("data", "labels"),
    deviations=(
        "The form of the fixed reweighting is ours: geometric weights from 1 to a smallest one.",
        "A downstream task with few labels is read by class means of 5 samples: with many, a linear probe undoes any "
        "invertible reweighting.",
        "Widths of the perceptron narrow like a head's, set after a rehearsal at 256 each in which ten classes were "
        "told at 77.7, 78.4 and 78.5% by depth.",
        "Rate and size of the linear networks' start were set after rehearsals in which the unbalanced one diverged "
        "(0.02) and the balanced one had not begun to grow (0.005 and a quarter of the size). The unbalanced first "
        "layer was three times an isometry until every full run of it diverged; 1.5 is the largest tried that did not.",
        "The linear claim is not repeated with ReLU networks.",
        "UrbanCars and ImageNet are left out; coarse labels are two halves of the classes of Fashion-MNIST.",
    ),
    verified=(
        "Gradient descent on the population loss reaches the optimum in closed form, of full and of lower rank.",
        "The balance of layers drifts half as much at half the learning rate, and balanced chains have slopes l/L.",
        "The loss against loops over pairs; probes against scikit-learn on features taken by hand.",
    ),
)  # fmt: skip
FEWEST = 100


@dataclass(frozen=True)
class Depth:
    """Hold what one layer's outputs know.

    Args:
        accuracy: Of a probe, on samples it was not fitted on.
        directions: How evenly variance is spread: (sum v)^2 / sum v^2 of the principal variances v; 0 without any.
        gain: Accuracy above that of the last layer, on the same samples.
        error: Standard error of the gain.
    """

    accuracy: float
    directions: float
    gain: float
    error: float


@dataclass(frozen=True)
class DepthReport:
    """Report what each layer knows.

    Args:
        layers: Layer -> its numbers, in the order they are called; the last is behind the head.
        scored: Samples the probes were scored on.
    """

    layers: Mapping[str, Depth]
    scored: int

    @property
    def best(self) -> str:
        """Return the layer of the highest accuracy, the last of those."""
        return max(list(self.layers)[::-1], key=lambda name: self.layers[name].accuracy)

    @property
    def verdict(self) -> str:
        """Return "warn" where some layer surely knows more than the last, "ok" where none can by 5 points.

        Sure means by an interval that covers all layers at once with 95%. Below 100 scored samples nothing is told.
        """
        earlier = list(self.layers.values())[:-1]
        if self.scored < FEWEST or not earlier:
            return "cannot tell"
        width = NormalDist().inv_cdf(1 - 0.025 / len(earlier))
        if any(one.gain - width * one.error > 0 for one in earlier):
            return "warn"
        return "ok" if all(one.gain + width * one.error < 0.05 for one in earlier) else "cannot tell"


def probe_depths(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    layers: Sequence[str] | None = None,
    kind: Kind = "ridge",
    widest: int = 4096,
    seed: int = 0,
) -> DepthReport:
    """Fit a probe on the outputs of every layer and compare each with the last.

    Half of the samples fit, the other half scores. The labels are those of the task the features are to serve, which
    need not be what the network was trained on.

    Args:
        model: The network, in whatever mode; it is read in eval mode.
        batches: One batch (inputs, class numbers) or a sequence of batches; a class for each position of a sequence
            makes every position a sample.
        layers: Names of modules in their order; None takes all that hold weights.
        kind: As in `nervure.core.readout.Readout`.
        widest: Outputs with more entries a sample are averaged over positions.
        seed: Deals the halves.

    Returns:
        The report.

    Raises:
        BadData: If there are fewer than four samples.
        Unsupported: If no layer puts out numbers for each sample.

    Examples:
        >>> x = torch.randn(400, 8)
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1, bias=False))
        >>> found = probe_depths(net, (x, (x[:, 3] > 0).long()))
        >>> found.best, found.verdict
        ('0', 'warn')
    """
    inputs, labels = joined(as_batches(batches))
    names = features.layers(model, inputs) if layers is None else list(layers)
    seen = features.features(model, inputs, names)
    rows = {name: _rows(seen[name], model.get_submodule(name), labels, widest) for name in names if name in seen}
    rows = {name: one for name, one in rows.items() if len(one) == labels.numel()}
    if not rows:
        raise Unsupported("probing depths", model, why="no layer puts out numbers for each sample")
    flat = labels.flatten().cpu()
    if len(flat) < 4:
        raise BadData("there are too few samples", expected="4 or more", found=len(flat))
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))
    fit, score = order[: len(flat) // 2], order[len(flat) // 2 :]
    right = {
        name: (Readout(one[fit], flat[fit], kind=kind).predict(one[score]) == flat[score]).double()
        for name, one in rows.items()
    }
    last = next(reversed(right.values()))
    return DepthReport({name: _depth(right[name], last, rows[name]) for name in rows}, len(score))


def _rows(calls: Sequence[Tensor], module: nn.Module, labels: Tensor, widest: int) -> Tensor:
    """Return a row of features for each label: for positions where these are labelled, else for samples."""
    if labels.ndim > 1:
        fitting = [one for one in calls if one.shape[: labels.ndim] == labels.shape]
        return torch.cat([one.flatten(0, labels.ndim - 1).flatten(1) for one in fitting], 1) if fitting else labels[:0]
    found = features.samples(calls)
    if found.shape[1] > widest:
        found = torch.cat([features.units([one], module).unflatten(0, (len(one), -1)).mean(1) for one in calls], 1)
    return found.cpu()


def _depth(right: Tensor, last: Tensor, rows: Tensor) -> Depth:
    gain = right - last
    centred = rows.double() - rows.double().mean(0)
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    spread = float(gram.square().sum())
    return Depth(
        accuracy=float(right.mean()),
        directions=float(gram.trace()) ** 2 / spread if spread else 0.0,
        gain=float(gain.mean()),
        error=float(gain.std()) / math.sqrt(len(gain)),
    )


class FixedReweight(nn.Module):
    """Weigh features by constants that fall geometrically from 1: a head that is not learned.

    Train through it and use what goes in. Differs from the paper: its decay is set by the smallest weight.

    Args:
        width: Features a sample.
        smallest: The last weight, above 0 and at most 1; 1 is no head.

    Raises:
        UsageError: If there is no such weight.

    Examples:
        >>> FixedReweight(3, smallest=0.25)(torch.ones(1, 3))
        tensor([[1.0000, 0.5000, 0.2500]])
    """

    weights: Tensor

    def __init__(self, width: int, *, smallest: float = 0.01) -> None:
        super().__init__()
        if not 0 < smallest <= 1 or width < 1:
            raise UsageError("there is no such weight", expected="above 0, at most 1", found=smallest)
        self.register_buffer("weights", smallest ** torch.linspace(0, 1, width) if width > 1 else torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighed features, shape (..., width)."""
        return x * self.weights


def spectral_contrastive(one: Tensor, two: Tensor) -> Tensor:
    """Return -2 mean_i f_i g_i + mean over i != j of (f_i g_j)^2: the spectral contrastive loss.

    Args:
        one: Features f of one view of each sample, shape (N, D), N at least 2.
        two: Features g of another view.

    Returns:
        A scalar.

    Examples:
        >>> spectral_contrastive(torch.eye(2), torch.eye(2)).item()
        -2.0
    """
    products = one @ two.T
    same = products.diagonal()
    count = len(one)
    return -2 * same.mean() + (products.square().sum() - same.square().sum()) / (count * (count - 1))


def layer_slopes(weights: Sequence[Tensor], *, rank: int) -> Tensor:
    """Return, for each depth of a linear network, the slope of log singular values against those of the whole map.

    Balanced layers have l/L after layer l of L, which is 1 at the last.

    Args:
        weights: Matrices in the order they are applied, each of shape (out, in).
        rank: How many leading singular values are compared, at least 2.

    Returns:
        Shape (L,), float64.

    Examples:
        >>> half = torch.diag(torch.tensor([2.0, 1.0]))
        >>> layer_slopes([half, half], rank=2)
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    product, found = torch.eye(weights[0].shape[1], dtype=torch.float64), []
    for weight in weights:
        product = weight.detach().double().cpu() @ product
        found.append(torch.linalg.svdvals(product)[:rank].log())
    logs = torch.stack(found)
    centred = logs - logs.mean(1, keepdim=True)
    return centred @ centred[-1] / centred[-1].square().sum()


def imbalance(weights: Sequence[Tensor]) -> Tensor:
    """Return |W_2' W_2 - W_1 W_1'| / (|W_2' W_2| + |W_1 W_1'|) of each two layers that follow each other.

    Gradient flow keeps the differences as they are, so small weights stay balanced while they grow.

    Args:
        weights: Matrices in the order they are applied, each of shape (out, in).

    Returns:
        Shape (L - 1,), float64, from 0 to 1.

    Examples:
        >>> imbalance([torch.eye(2), torch.eye(2)])
        tensor([0.], dtype=torch.float64)
    """
    found = []
    for one, two in pairwise(weight.detach().double().cpu() for weight in weights):
        below, above = one @ one.T, two.T @ two
        found.append((above - below).norm() / (above.norm() + below.norm()))
    return torch.stack(found)


@claim(
    CARD,
    checks=(
        Check.at_most("slope one half", method="balanced", metric="off", bound=0.05),
        Check.at_least("another slope without balance", method="unbalanced", metric="off", bound=0.1),
        Check(name="2 points before the head on the weak feature", method="before the head", control="after the head",
              metric="weak", margin=0.02),
        Check(name="no advantage on the strong feature", method="after the head", control="before the head",
              metric="strong", margin=-0.02),
    ),
    sabotage={"unbalanced": "balanced"},
    seeds=5,
    minutes=1.0,
)  # fmt: skip
def encoders_take_square_roots(ctx: Ctx) -> None:
    """After contrastive training encoders have root singular values, and know a weak feature better than the head.

    Two linear layers 8-16-16 on three binary features under augmentation noise of variance 0.1, 1 and 4, and five
    entries of noise; 3,000 steps of SGD at 0.01 on 256 pairs. Unbalanced is a first layer 1.5 times an isometry.
    Weak and strong are few-shot tasks with 5 labels a class on clean samples.
    """
    for arm, gain in (("balanced", None), ("unbalanced", 1.5)):
        net = LinearPair(gain=gain, draw=ctx.generator("weights"))
        trained(net, spectral_contrastive, steps=ctx.scaled(3000, 300), draw=ctx.generator("pairs"))
        weights = [net.encoder.weight, net.head.weight]
        off = abs(float(layer_slopes(weights, rank=3)[0]) - 0.5)
        ctx.measure(arm, off=off, imbalance=float(imbalance(weights)[0]))
        if gain is not None:
            continue
        x, signs = feature_world(2000, ctx.generator("task"))
        depths = forward.predict(net.encoder, x), forward.predict(net, x)
        for place, rows in zip(("before the head", "after the head"), depths, strict=True):
            strong, weak = (
                float(few_shot(rows, signs[:, k].long(), shots=5, seed=ctx.seed_for("episodes") % 2**32).mean())
                for k in (0, 2)
            )
            ctx.measure(place, weak=weak, strong=strong)


@claim(
    CARD,
    checks=(
        Check.at_least("2 points before the head on ten classes", method="coarse labels", metric="fine_gain",
                       bound=0.02),
        Check.at_most("no advantage on the two it was trained on", method="coarse labels", metric="coarse_gain",
                      bound=0.02),
    ),
    sabotage={"fine labels": "coarse labels"},
    seeds=5,
    minutes=1.5,
    data=("fashion-mnist",),
)  # fmt: skip
def coarse_labels_leave_more_before_the_head(ctx: Ctx) -> None:
    """Trained on two coarse classes, a perceptron tells ten classes better before its last hidden layer than after.

    784-256-128-32-2 on 6,000 images of Fashion-MNIST for 1,500 steps of Adam; the last hidden layer is the head. Ridge
    probes on half of 3,000 other images, scored on the rest. Fine labels train the same network on all ten classes.
    """
    data = ctx.data("fashion-mnist", train=6000, test=3000)
    two = coarse(data)
    steps = ctx.scaled(1500, 150)
    ctx.plan(2 * steps)
    layers = [f"layers.{depth}" for depth in range(3)]
    for arm, given in (("coarse labels", two), ("fine labels", data)):
        model = ctx.model("mlp", features=784, hidden=(256, 128, 32), classes=given.classes)
        ctx.train(model, given, steps=steps)
        found = {
            name: probe_depths(model, (data.test_x, labels), layers=layers, seed=ctx.seed % 2**32).layers
            for name, labels in (("fine", data.test_y), ("coarse", two.test_y))
        }
        ctx.measure(
            arm,
            fine_gain=found["fine"][layers[1]].gain,
            coarse_gain=found["coarse"][layers[1]].gain,
            **{f"depth_{place + 1}": found["fine"][name].accuracy for place, name in enumerate(layers)},
            **{f"directions_{place + 1}": found["fine"][name].directions for place, name in enumerate(layers)},
        )
