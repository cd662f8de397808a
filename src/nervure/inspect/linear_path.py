"""The straight path from a network's start to its solution: whether anything stood in the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from nervure.core.connectivity import Line, Statistics, line
from nervure.core.graph import as_batches
from nervure.core.line_curvature import mean_loss
from nervure.core.permutation import PermutationGraph, permuted
from nervure.core.persample import Loss
from nervure.inspect._connectivity_trial import Samples, perceptron, pooled, scaled, sgd
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="linear-path",
    n=69,
    title="Qualitatively characterizing neural network optimization problems",
    year=2014,
    link="https://arxiv.org/abs/1412.6544",
    family="inspect",
    summary=(
        "On the straight line from its initial weights to the solution SGD found, a network's loss falls steadily: "
        "whatever slows training down, it is no hill on that line. Lines from elsewhere, or between two solutions, do "
        "cross hills."
    ),
    tags=("loss landscape", "linear interpolation", "optimisation path", "barrier", "initialisation"),
    provides=("straight_path", "StraightPath"),
    protocol="diagnostic",
    claims=("falls_from_its_own_start",),
    needs=("data", "labels"),
    deviations=(
        "Between two solutions the rises are taken relative to what training lowered the loss by, as the two ends "
        "have about one loss.",
        "The claim's networks have no batch norm and small learning rates, where later work found exceptions.",
        "In the rehearsal lines from an unrelated start, and to the solution with permuted units, fell as steadily: a "
        "fall without rises says nothing of whose start it is, and the claim does not say so. Their excess over the "
        "chord is larger, and is measured.",
        "Planes are in nervure.core.landscape: random filter-normalised ones, through three networks, and of a run.",
    ),
    verified=(
        "A quadratic's values equal the exact parabola and paraboloid to 1e-10; ends equal direct evaluation bitwise.",
        "Lines and planes equal those of loss_landscapes 3.0.6 to 1e-6 at the places it visits: its lines begin one "
        "step late, and every other column of its planes is one step off.",
    ),
)


@dataclass(frozen=True)
class StraightPath:
    """Hold the loss on the line from a start (0) to a solution (1), and somewhat beyond both.

    Args:
        train: On the batches.
        validation: On other batches, or None.
        tolerance: Bumpiness that counts as none.
    """

    train: Line
    validation: Line | None
    tolerance: float

    @property
    def verdict(self) -> str:
        """Return "ok" where the loss falls all the way, "warn" where it rises by more than the tolerance.

        It cannot be told where the solution is no better than the start, or a loss is not finite.
        """
        losses = self.train.losses
        if not bool(losses.isfinite().all()) or not math.isfinite(self.train.bumpiness):
            return "cannot tell"
        if self.train.losses[self.train.shares == 1] >= self.train.losses[self.train.shares == 0]:
            return "cannot tell"
        return "ok" if self.train.bumpiness <= self.tolerance else "warn"


def straight_path(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    start: nn.Module,
    validation: Batch | Sequence[Batch] | None = None,
    loss: Loss = F.cross_entropy,
    points: int = 26,
    beyond: float = 0.2,
    parameters: Sequence[str] | None = None,
    statistics: Statistics = "recomputed",
    tolerance: float = 0.02,
    seed: int = 0,
) -> StraightPath:
    """Measure the loss at (1 - t) start + t solution, from a little before the start to beyond the solution.

    Bumpiness is the sum of all rises between 0 and 1 over the drop from 0 to 1.

    Args:
        model: The solution, left as it is; it is run in eval mode.
        batches: One batch (inputs, targets) or a sequence of batches.
        start: The network before training.
        validation: Other batches to measure on too.
        loss: From (output, targets) of a batch to its mean loss.
        points: Points from 0 to 1, ends included, at least 2.
        beyond: How far the line goes on beyond both ends, at the same spacing; at least 0.
        parameters: Names or prefixes of what moves, with the rest at the start; None moves everything.
        statistics: Running statistics of batch norms on the way, estimated on the batches' inputs where they are
            recomputed; see `nervure.core.connectivity.line`.
        tolerance: Bumpiness that counts as none.
        seed: Without effect: nothing is drawn.

    Returns:
        The path.

    Examples:
        >>> import copy, torch
        >>> start = nn.Linear(4, 3)
        >>> batch = (torch.randn(64, 4), torch.arange(64) % 3)
        >>> model = copy.deepcopy(start)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     F.cross_entropy(model(batch[0]), batch[1]).backward()
        ...     optimizer.step()
        >>> straight_path(model, batch, start=start).verdict  # a convex loss falls all the way
        'ok'
    """
    every = as_batches(batches)
    inputs = [one for one, _ in every]
    extra = round(beyond * (points - 1))
    shares = [place / (points - 1) for place in range(-extra, points + extra)]

    def along(measured: Sequence[Batch]) -> Line:
        return line(
            start,
            model,
            mean_loss(measured, loss),
            shares=shares,
            parameters=parameters,
            statistics=statistics,
            batches=inputs,
        )

    return StraightPath(along(every), along(as_batches(validation)) if validation is not None else None, tolerance)


@claim(
    CARD,
    checks=(
        Check.at_most("the perceptron's own line falls", method="own line, mlp", metric="bumpiness", bound=0.02,
                      rule="every-seed"),
        Check.at_most("the convolutional network's own line falls", method="own line, cnn", metric="bumpiness",
                      bound=0.02, rule="every-seed"),
        Check.at_least("between perceptrons it does not", method="independent, mlp", metric="bumpiness", bound=0.1,
                       rule="every-seed"),
        Check.at_least("between convolutional networks it does not", method="independent, cnn", metric="bumpiness",
                       bound=0.1, rule="every-seed"),
    ),
    sabotage={"independent, mlp": "own line, mlp", "independent, cnn": "own line, cnn",
              "own line, mlp": "independent, mlp"},
    seeds=5,
    minutes=3.0,
    data=("fashion-mnist",),
)  # fmt: skip
def falls_from_its_own_start(ctx: Ctx) -> None:
    """The loss falls all the way from initialisation to an SGD solution, and does not between independent solutions.

    Perceptron 196-128-128-10 on 6,000 pooled Fashion-MNIST images, 2,000 steps of SGD at 0.05 without momentum; LeNet
    on the images, 600 steps at 0.05 with momentum 0.9; batches of 64, 26 points, training loss of 1,000 images.
    Rises relative to what training lowered the loss by. Each arm is the other's sabotage. Beside them, without a
    bound: the line from an unrelated start, scaled to the norm of the true one, and the line from the start to the
    solution with its units in random order.
    """
    data = ctx.data("fashion-mnist", train=6000, test=10)
    flat = pooled(data)
    ctx.plan(2 * ctx.scaled(2600, 260))
    for kind, samples, steps, momentum in (
        ("mlp", flat, ctx.scaled(2000, 200), 0.0),
        ("cnn", Samples(data.train_x, data.train_y, data.test_x, data.test_y), ctx.scaled(600, 60), 0.9),
    ):
        starts = [perceptron(ctx, tag, (128, 128)) if kind == "mlp" else ctx.model("lenet", draw=tag) for tag in "ab"]
        ends = [
            sgd(ctx, start, samples, steps, tag, momentum=momentum) for tag, start in zip("ab", starts, strict=True)
        ]
        graph = PermutationGraph.of(ends[0], samples.train_x[:2])
        shuffled = permuted(ends[0], graph, graph.random(seed=ctx.seed))
        measure = mean_loss([(samples.train_x[:1000], samples.train_y[:1000])], F.cross_entropy)
        drop = measure(starts[0]) - measure(ends[0])
        for arm, start, end in (
            ("own line", starts[0], ends[0]),
            ("independent", ends[1], ends[0]),
            ("unrelated start", scaled(starts[1], like=starts[0]), ends[0]),
            ("permuted end", starts[0], shuffled),
        ):
            found = line(start, end, measure, shares=26)
            rises = float(found.losses.diff().clamp_min(0).sum())
            ctx.measure(f"{arm}, {kind}", bumpiness=rises / drop, barrier=found.barrier, end=measure(end))
