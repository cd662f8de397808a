"""Grokking: a network fits its training data, and generalises long afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from nervure._kit import UsageError
from nervure.core.group_tables import Group, symmetric
from nervure.core.persample import Loss
from nervure.core.recorder import Event, Measure, Recorder, accuracy_of, losses_of
from nervure.inspect._delayed import Times, shuffled, table_task, train
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="grokking",
    n=291,
    title="Grokking: Generalization Beyond Overfitting on Small Algorithmic Datasets",
    year=2022,
    link="https://arxiv.org/abs/2201.02177",
    family="inspect",
    summary=(
        "On tables of binary operations of which only some cells are seen, a network first fits these and generalises "
        "to the others many times more steps later. The delay grows as the share of seen cells falls, and weight "
        "decay shortens it most."
    ),
    tags=("grokking", "delayed generalisation", "algorithmic data", "weight decay", "modular arithmetic", "recorder"),
    provides=("Grokking", "GrokkingReport", "operation", "concentration"),
    claims=("generalises_long_after_memorising",),
    needs=("data", "labels"),
    deviations=(
        "The claim trains a network of one hidden layer on S4 by full-batch steps; the paper a transformer of two "
        "layers on tables of 97 and 120 elements by batches of 512.",
        "Times are the first recorded step at which a bound is reached; records are 12% apart.",
        "Whether embeddings show the group is a number, the share of energy per irreducible representation, and not a "
        "picture.",
    ),
    verified=(
        "Tables: associativity, inverses and counts by brute force; modular division by multiplying back.",
        "Times and censoring on curves with known crossings; concentration against numpy.fft.",
    ),
)

Operation = Literal["a+b", "a-b", "a*b", "a/b", "a^2+b^2", "a^2+ab+b^2", "a^3+ab"]
_POLYNOMIALS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a+b": lambda a, b: a + b,
    "a-b": lambda a, b: a - b,
    "a*b": lambda a, b: a * b,
    "a^2+b^2": lambda a, b: a**2 + b**2,
    "a^2+ab+b^2": lambda a, b: a**2 + a * b + b**2,
    "a^3+ab": lambda a, b: a**3 + a * b,
}


def operation(name: Operation, p: int) -> Tensor:
    """Return the table of an operation modulo a prime.

    Args:
        name: The operation; ``"a/b"`` is the number that times b gives a.
        p: The prime, at least 2.

    Returns:
        [a, b] = the answer, shape (p, p); -1 where it is not defined.

    Raises:
        UsageError: If there is no such operation, or division has no unique answer.

    Examples:
        >>> operation("a/b", 3).tolist()
        [[-1, 0, 0], [-1, 1, 2], [-1, 2, 1]]
    """
    a, b = torch.arange(p)[:, None], torch.arange(p)[None]
    if name in _POLYNOMIALS:
        return _POLYNOMIALS[name](a, b) % p
    if name != "a/b":
        raise UsageError("there is no such operation", expected=f"one of {[*_POLYNOMIALS, 'a/b']}", found=name)
    if p < 2 or any(p % d == 0 for d in range(2, math.isqrt(p) + 1)):
        raise UsageError("division needs a prime", expected="a prime", found=p)
    products = a * b % p
    found = torch.full((p, p), -1)
    found[products[:, 1:], torch.arange(1, p)[None].expand(p, p - 1)] = a.expand(p, p - 1)
    return found


def concentration(values: Tensor, group: Group) -> Tensor:
    """Return 1 / sum of squared shares of energy per irrep, the trivial one left out: how many irreps are in use.

    Args:
        values: One function on the group a column, such as an embedding with a row for each element, shape (n, m).
        group: The group; a cyclic one makes the irreps frequencies.

    Returns:
        A number of each column, between 1 and the number of irreps less one; 0 where it is constant. Shape (m,).
    """
    centred = values - values.mean(0)
    squares = group.power(centred)[1:].square().sum(0)
    return torch.where(squares > 0, 1 / squares.clamp_min(torch.finfo(squares.dtype).tiny), 0)


@dataclass(frozen=True)
class GrokkingReport:
    """Say when a network memorised and when it generalised.

    Args:
        memorise: First record at which the training accuracy reached its bound.
        generalise: First record at which the test accuracy reached its bound.
        steps: The recorded steps, shape (T,).
        curves: Name -> numbers at these steps: accuracies and mean losses of both sets, the norm of the weights.
    """

    memorise: Event
    generalise: Event
    steps: Tensor
    curves: Mapping[str, Tensor]

    @property
    def delay(self) -> float:
        """How many times as long it took: a lower bound where it did not generalise, NaN where it did not memorise."""
        return self.generalise.time / max(1.0, self.memorise.time) if self.memorise.observed else math.nan

    @property
    def verdict(self) -> str:
        """Return "ok" if it generalised, "warn" if it only memorised yet, "cannot tell" if neither happened."""
        if self.generalise.observed:
            return "ok"
        return "warn" if self.memorise.observed else "cannot tell"


class Grokking:
    """Watch any training loop of a classifier for delayed generalisation.

    Call `step` after each optimizer step; records are log-spaced. As a hook of `nervure.learn.Loop` it works as it is.
    The model is evaluated in eval mode and otherwise left alone.

    Args:
        model: The classifier; classes are the last axis of its main output.
        train: Inputs and classes it is trained on, or a part of them.
        test: Inputs and classes it is not trained on.
        memorised: Training accuracy that counts as memorised, in (0, 1].
        generalised: Test accuracy that counts as generalised, in (0, 1].
        loss: From (output, targets) of a batch to a scalar, for the losses of each sample.
        measures: Further measures, such as ``{"irreps": lambda: concentration(net.embed.weight, group).mean()}``.
        per_decade: Records between a step and ten times that step.

    Raises:
        UsageError: If a further measure has a name that is in use, or a bound is outside its range.

    Examples:
        >>> x = torch.randn(64, 8)
        >>> y = (x[:, 0] > 0).long()
        >>> model = nn.Linear(8, 2)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        >>> watch = Grokking(model, (x[:32], y[:32]), (x[32:], y[32:]), generalised=0.8)
        >>> for t in range(1, 101):
        ...     optimizer.zero_grad()
        ...     F.cross_entropy(model(x[:32]), y[:32]).backward()
        ...     optimizer.step()
        ...     _ = watch.step(t)
        >>> watch.report().verdict
        'ok'
    """

    def __init__(
        self,
        model: nn.Module,
        train: Batch,
        test: Batch,
        *,
        memorised: float = 0.99,
        generalised: float = 0.95,
        loss: Loss = F.cross_entropy,
        measures: Mapping[str, Measure] | None = None,
        per_decade: int = 20,
    ) -> None:
        if not (0 < memorised <= 1 and 0 < generalised <= 1):
            raise UsageError("no such accuracy", expected="bounds in (0, 1]", found=(memorised, generalised))
        own: dict[str, Measure] = {
            "train_accuracy": accuracy_of(model, *train),
            "test_accuracy": accuracy_of(model, *test),
            "train_loss": losses_of(model, *train, loss),
            "test_loss": losses_of(model, *test, loss),
            "weight_norm": lambda: _norm(model),
        }
        taken = sorted(set(own) & set(measures or {}))
        if taken:
            raise UsageError(f"the measures {', '.join(taken)} are there already", try_="other names")
        self.memorised, self.generalised = memorised, generalised
        self.recorder = Recorder({**own, **(measures or {})}, per_decade=per_decade)

    def step(self, step: float, *, always: bool = False) -> bool:
        """Record a step if it is due.

        Args:
            step: The number of the step.
            always: Record in any case, as for the last step of a run.

        Returns:
            Whether it was recorded.
        """
        return self.recorder.step(step, always=always)

    def after_step(self, step: int) -> None:
        """Record a step of `nervure.learn.Loop` if it is due.

        Args:
            step: The number of the step.
        """
        self.recorder.step(step)

    def report(self) -> GrokkingReport:
        """Return what was seen so far.

        Returns:
            The report.
        """
        names = list(self.recorder.measures)
        return GrokkingReport(
            self.recorder.first("train_accuracy", at_least=self.memorised),
            self.recorder.first("test_accuracy", at_least=self.generalised),
            torch.tensor(self.recorder.steps, dtype=torch.float64),
            {name: self.recorder.mean(name) for name in names},
        )


@torch.no_grad()
def _norm(model: nn.Module) -> float:
    return float(sum(value.double().square().sum() for value in model.parameters()) ** 0.5)


_SHARES, _MAIN = (0.5, 0.6, 0.7, 0.8, 0.9), 0.8


@claim(
    CARD,
    checks=(
        Check.at_least("train accuracy reaches 1", method="decay", metric="train", bound=1.0, rule="every-seed"),
        Check.at_least("test accuracy reaches 0.95", method="decay", metric="test", bound=0.95, rule="every-seed"),
        Check.at_least("five times as many steps", method="decay", metric="delay", bound=5.0, rule="every-seed"),
        Check.at_most("no better than chance when memorised", method="decay", metric="test_then", bound=1 / 24),
        Check.at_most("the delay falls with the share", method="shares", metric="spearman", bound=-0.8),
        Check.at_most("without decay it does not", method="no decay", metric="test", bound=0.95),
        Check.at_most("a random table stays at chance", method="random table", metric="test", bound=2 / 24),
    ),
    sabotage={"no decay": "decay", "random table": "decay", "swapped": "decay"},
    seeds=5,
    minutes=2.5,
)  # fmt: skip
def generalises_long_after_memorising(ctx: Ctx) -> None:
    """On the table of S4 a network fits all it sees while it knows nothing of the rest, which it learns much later.

    The delay falls as the share of seen cells grows; without weight decay, and on a table with the same entries in
    random cells, the network never generalises. One hidden layer of 256 on one-hot pairs, AdamW 0.01, decay 1, 4,000
    full-batch steps, shares 0.5 to 0.9; all checks but the fifth at 0.8. The delay is the step at which 95% of the
    unseen cells are right over that at which 99% of the seen ones are, 0 where one of them is never reached; for the
    rank correlation it is their difference, 4,000 where the network never generalises. `test` is the highest accuracy
    of the run. The arm "swapped" is the run of arm "decay" with its two curves exchanged.
    """
    table, steps = symmetric(4).table, ctx.scaled(4000, 2000)

    def run(answers: Tensor, share: float, decay: float) -> Times:
        task = table_task(answers, share, seed=ctx.seed_for("cells", share))
        return train(task, seed=ctx.seed_for("weights"), steps=steps, decay=decay, after_step=lambda t: _tick(ctx, t))

    every = {share: run(table, share, 1.0) for share in _SHARES}
    waits = [
        times.generalise.time - times.memorise.time if times.generalise.observed else steps for times in every.values()
    ]
    ctx.measure("shares", spearman=float(spearmanr(_SHARES, waits)[0]) if len(set(waits)) > 1 else 0.0)
    for share, times in every.items():
        ctx.measure("shares", step=share, memorise=times.memorise.time, generalise=times.generalise.time)
    main = every[_MAIN]
    arms = {
        "decay": (main, "train", "test"),
        "swapped": (main, "test", "train"),
        "no decay": (run(table, _MAIN, 0.0), "train", "test"),
        "random table": (run(shuffled(table, ctx.seed_for("table")), _MAIN, 1.0), "train", "test"),
    }
    for arm, (times, seen, unseen) in arms.items():
        ctx.measure(arm, **_learnt(times.recorder, seen, unseen))
        curves = (times.recorder.curve(name).tolist() for name in (seen, unseen))
        for step, *point in zip(times.recorder.steps, *curves, strict=True):
            ctx.measure(arm, step=step, train_curve=point[0], test_curve=point[1])


def _learnt(recorder: Recorder, seen: str, unseen: str) -> dict[str, float]:
    memorise = recorder.first(seen, at_least=0.99)
    generalise = recorder.first(unseen, at_least=0.95)
    then = recorder.curve(unseen)[recorder.steps.index(memorise.time)]
    both = memorise.observed and generalise.observed
    return {
        "train": float(recorder.curve(seen).max()),
        "test": float(recorder.curve(unseen).max()),
        "test_then": float(then),
        "delay": generalise.time / max(1.0, memorise.time) if both else 0.0,
        "memorise": memorise.time,
        "generalise": generalise.time,
    }


def _tick(ctx: Ctx, step: int) -> None:
    if step % 200 == 0:
        ctx.progress(0, 0, f"step {step:,}")
