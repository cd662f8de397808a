"""Effective model complexity: how many samples a network and its training fit perfectly."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure._kit import BadData, UsageError
from nervure.core import rng
from nervure.core.forward import batch_size as count_of
from nervure.core.forward import mode, outputs, predict, take
from nervure.core.graph import as_batches, joined
from nervure.core.lanczos import eigenpairs
from nervure.core.operators import hessian
from nervure.core.persample import Loss
from nervure.core.vectors import only, select
from nervure.inspect._capacity_trial import arms, cover, separable
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="effective-model-complexity",
    n=283,
    title="Just How Flexible are Neural Networks in Practice?",
    year=2024,
    link="https://arxiv.org/abs/2406.11463",
    family="inspect",
    summary=(
        "The most samples a network fits perfectly when trained afresh: far below its number of parameters, larger for "
        "true labels than for random ones, and a matter of the optimizer and activation as much as of size."
    ),
    tags=("capacity", "memorisation", "expressivity", "random labels", "effective model complexity", "bisection"),
    provides=("effective_complexity", "Capacity", "Fit", "capacity"),
    protocol="diagnostic",
    claims=("capacity_is_far_below_the_parameters", "few_epochs_are_no_capacity"),
    needs=("data", "labels"),
    deviations=(
        "A failure counts once a whole round of training lowers the loss by under a tenth and the Hessian has no "
        "negative eigenvalue of a tenth of the largest; the paper's own bounds are not known here.",
        "The sample size is doubled and then bisected, where the paper grows it step by step.",
        "The pool was enlarged from 1,000 to 3,000 samples, and the search for few epochs made coarser, after a "
        "rehearsal fitted all there were.",
    ),
    verified=(
        "Cover's counting theorem for linear classifiers; a linear regression fits as many targets as it has inputs.",
        "A lookup table is found unbounded, and training cut short is flagged as not converged.",
    ),
)


@dataclass(frozen=True)
class Fit:
    """Say how one training ended.

    Args:
        samples: How many samples it had.
        fitted: Whether every one of them came out right.
        converged: Whether it was over: fitted, or the loss had stopped falling.
        accuracy: Share of samples that came out right.
        loss: The last round's mean loss.
        gradient: Norm of the gradient over all samples at the end, relative to the start.
    """

    samples: int
    fitted: bool
    converged: bool
    accuracy: float = math.nan
    loss: float = math.nan
    gradient: float = math.nan


@dataclass(frozen=True)
class Capacity:
    """Report how many samples fit.

    Args:
        fits: Every training, in the order it was made.
        parameters: Number of parameters that were trained; 0 if not known.
        saddle: Smallest over largest eigenvalue of the Hessian at the smallest failure; None if there is none or an
            eigenvalue did not converge. Below -0.1 the failure may be that of the training.
    """

    fits: tuple[Fit, ...]
    parameters: int
    saddle: float | None = None

    @property
    def samples(self) -> int:
        """The most samples that were fitted; 0 if none were."""
        return max((fit.samples for fit in self.fits if fit.fitted), default=0)

    @property
    def above(self) -> int | None:
        """The fewest samples above that which were not fitted, or None where all there are fit: no bound is known."""
        return min((fit.samples for fit in self.fits if fit.samples > self.samples), default=None)

    @property
    def per_parameter(self) -> float:
        """Fitted samples over parameters."""
        return self.samples / self.parameters if self.parameters else math.nan

    @property
    def verdict(self) -> str:
        """Return "ok" where the number stands, "cannot tell" where all samples fit or a failure was not converged."""
        failure = next((fit for fit in self.fits if fit.samples == self.above), None)
        sound = failure is not None and failure.converged and not (self.saddle is not None and self.saddle < -0.1)
        return "ok" if sound else "cannot tell"


def capacity(attempt: Callable[[int], Fit], *, start: int, most: int, tolerance: float = 0.2) -> list[Fit]:
    """Find the most samples that fit: double from a start while they fit, halve if not, then bisect.

    Args:
        attempt: From a number of samples to how a training on them ends.
        start: First number, at least 1.
        most: Largest number.
        tolerance: Where the ratio of failure to success is at most one more than this, the search ends.

    Returns:
        The trainings, in order.

    Raises:
        UsageError: If a number is out of range.

    Examples:
        >>> fits = capacity(lambda n: Fit(n, fitted=n <= 100, converged=True), start=8, most=1000, tolerance=0.05)
        >>> max(fit.samples for fit in fits if fit.fitted), len(fits)
        (100, 9)
    """
    if not 1 <= start <= most or tolerance <= 0:
        raise UsageError("no such search", expected="1 <= start <= most, tolerance > 0", found=(start, most, tolerance))
    fits: list[Fit] = []
    low, high, n = 0, most + 1, start
    while True:
        fits.append(attempt(n))
        low, high = (n, high) if fits[-1].fitted else (low, n)
        if high - low <= 1 or (low and high <= most and high <= (1 + tolerance) * low):
            return fits
        n = min(2 * low, most) if high > most else (low + high) // 2


def effective_complexity(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    loss: Loss = F.cross_entropy,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    batch_size: int = 32,
    epochs: int = 100,
    rounds: int = 6,
    right: Callable[[Tensor, Tensor], Tensor] | None = None,
    start: int = 16,
    tolerance: float = 0.2,
    parameters: Iterable[str] | None = None,
    seed: int = 0,
) -> Capacity:
    """Find how many of the samples a copy of the model, trained from the weights it has, fits perfectly.

    Differs from the paper: see the card on what counts as a failure.

    Args:
        model: A freshly initialised model; it is not changed.
        batches: All samples there are: one batch (inputs, targets) or a sequence of batches.
        loss: From (output, targets) of a batch to its mean loss.
        optimizer: From parameters to an optimizer; Adam of rate 0.005 by default.
        batch_size: Samples in a step; above the number of samples, full-batch descent.
        epochs: Passes over the samples in one round.
        rounds: Most rounds; one more is made while the last lowered the loss by a tenth or more.
        right: From (outputs, targets) to whether each sample came out right, shape (N,); classes by default.
        start: First number of samples.
        tolerance: As in `capacity`.
        parameters: Names or prefixes of what is trained; None takes all that require a gradient.
        seed: Draws which samples come first, and the order in training.

    Returns:
        The report.

    Raises:
        UsageError: If a number is out of range.

    Examples:
        >>> x, y = torch.randn(64, 6), torch.randint(2, (64,))
        >>> found = effective_complexity(nn.Linear(6, 2), (x, y), epochs=30, start=4)
        >>> 4 <= found.samples < 40
        True
    """
    if min(batch_size, epochs, rounds) < 1:
        raise UsageError("no such training", expected="numbers above 0", found=(batch_size, epochs, rounds))
    inputs, targets = joined(as_batches(batches))
    count = count_of(inputs)
    order = torch.randperm(count, generator=rng.generator("capacity", seed))
    right = right or _classes
    failed: dict[int, nn.Module] = {}

    def attempt(n: int) -> Fit:
        twin = copy.deepcopy(model)
        chosen = select(twin, parameters)
        made = (optimizer or (lambda each: torch.optim.Adam(each, lr=0.005, fused=True)))(list(chosen.values()))
        part = (take(inputs, order[:n]), take(targets, order[:n]))
        with rng.scope("capacity", seed, n), only(twin, chosen):
            fit = _train(twin, part, loss, made, right, batch_size=batch_size, epochs=epochs, rounds=rounds)
        if not fit.fitted:
            failed[n] = twin
        return fit

    fits = tuple(capacity(attempt, start=min(start, count), most=count, tolerance=tolerance))
    size = sum(value.numel() for value in select(model, parameters).values())
    above = Capacity(fits, size).above
    saddle = None
    if above is not None:
        part = (take(inputs, order[:above]), take(targets, order[:above]))
        saddle = _saddle(failed[above], part, loss, parameters)
    return Capacity(fits, size, saddle)


def _classes(output: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point() or output.shape[:-1] != targets.shape:
        raise BadData("the targets are no classes", expected=tuple(output.shape[:-1]), try_="giving `right`")
    return (output.argmax(-1) == targets).reshape(len(targets), -1).all(1)


def _train(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    right: Callable[[Tensor, Tensor], Tensor],
    *,
    batch_size: int,
    epochs: int,
    rounds: int,
) -> Fit:
    """Train until every sample comes out right, or a round lowers the loss by under a tenth."""
    inputs, targets = batch
    n = count_of(inputs)

    def slope() -> float:
        optimizer.zero_grad()
        loss(outputs(model, inputs), targets).backward()
        held = [value.grad for group in optimizer.param_groups for value in group["params"] if value.grad is not None]
        return float(torch.stack([g.square().sum() for g in held]).sum().sqrt()) if held else 0.0

    first, last, accuracy = slope(), math.inf, 0.0
    for _ in range(rounds):
        total, after = 0.0, 0
        for epoch in range(epochs):
            for index in torch.randperm(n).split(batch_size):
                optimizer.zero_grad()
                value = loss(outputs(model, take(inputs, index)), take(targets, index))
                value.backward()
                optimizer.step()
                # A round's loss is that of its second half.
                if epoch >= epochs // 2:
                    total, after = total + float(value.detach()) * len(index), after + len(index)
            if epoch % 10 == 9 or epoch == epochs - 1:
                accuracy = float(right(predict(model, inputs), targets).double().mean())
                if accuracy == 1.0:
                    return Fit(n, True, True, 1.0, total / max(1, after), slope() / max(first, 1e-30))
        mean = total / after
        if not mean < 0.9 * last:
            return Fit(n, False, math.isfinite(mean), accuracy, mean, slope() / max(first, 1e-30))
        last = mean
    return Fit(n, False, False, accuracy, last, slope() / max(first, 1e-30))


def _saddle(model: nn.Module, batch: Batch, loss: Loss, parameters: Iterable[str] | None) -> float | None:
    """Return the smallest over the largest eigenvalue of the Hessian, None where one did not converge."""
    with mode(model, train=False):
        operator = hessian(model, batch, loss, parameters=parameters)
        ends = [eigenpairs(operator, 1, which=end, tolerance=0.02, limit=60) for end in ("smallest", "largest")]
    if not all(bool(end.converged[0]) for end in ends) or not float(ends[1].values[0]) > 0:
        return None
    return float(ends[0].values[0] / ends[1].values[0])


@claim(
    CARD,
    checks=(
        Check.at_most("an MLP fits fewer than half its parameters", method="MLP", metric="per_parameter", bound=0.5),
        Check.at_most("so does a CNN", method="CNN", metric="per_parameter", bound=0.5),
        Check.at_least("true labels fit better than random ones", method="true labels", metric="times_random",
                       bound=1.5),
        Check.at_least("ReLU fits more than tanh", method="MLP", metric="times_tanh", bound=1.1),
        Check.at_least("a lookup table has no bound", method="lookup table", metric="unbounded", bound=1.0),
        Check.at_most("a linear classifier has the capacity of Cover's theorem", method="linear", metric="error",
                      bound=0.1),
    ),
    sabotage={"random labels again": "true labels"},
    seeds=3,
    minutes=3.0,
    data=("digits",),
)  # fmt: skip
def capacity_is_far_below_the_parameters(ctx: Ctx) -> None:
    """A network fits fewer random labels than half its parameters, more true labels, and fewer with tanh than ReLU.

    Gaussian 8x8 images with 10 random classes and digits, nets of about 1900 parameters, Adam of rate 0.005 in batches
    of 32, at most 120 epochs, bisection to 20%; whether failures had converged is measured beside. The CNN, and
    full-batch descent of rate 0.3, are compared with the MLP without a bound. The sabotaged arm gives random labels in
    place of the true ones. The linear classifier has 20 inputs and two classes, where 40 random points can be parted
    with probability one half.
    """
    found: dict[str, Capacity] = {}
    given = arms(ctx, ctx.data("digits", train=1400))
    for place, (arm, (model, batch, optimizer)) in enumerate(given.items()):
        size = 10_000 if arm == "full batch" else 32
        found[arm] = effective_complexity(
            model, batch, optimizer=optimizer, batch_size=size, epochs=ctx.scaled(60, 20), rounds=ctx.scaled(2, 1),
            start=64, seed=ctx.seed_for("order") % 2**31,
        )  # fmt: skip
        one = found[arm]
        ctx.measure(arm, samples=one.samples, per_parameter=one.per_parameter, sound=float(one.verdict == "ok"))
        ctx.progress(place + 1, len(given) + 1, arm)
    random = max(1, found["random labels"].samples)
    for arm in ("true labels", "random labels again"):
        ctx.measure(arm, times_random=found[arm].samples / random)
    ctx.measure("MLP", times_tanh=found["MLP"].samples / max(1, found["tanh"].samples))
    table = capacity(lambda n: Fit(n, fitted=True, converged=True), start=16, most=1400)
    ctx.measure("lookup table", unbounded=float(Capacity(tuple(table), 0).above is None))
    ctx.measure("linear", error=abs(separable(ctx, inputs=20) / cover(20) - 1))


@claim(
    CARD,
    checks=(
        Check.at_most("training cut short is flagged", method="five epochs", metric="sound", bound=0.0),
        Check.at_least("training to the end is not", method="to the end", metric="sound", bound=1.0),
    ),
    seeds=3,
    minutes=0.5,
)
def few_epochs_are_no_capacity(ctx: Ctx) -> None:
    """A failure after five epochs is called not converged, and no low capacity."""
    model, batch, _ = arms(ctx, None)["MLP"]
    for arm, epochs, rounds in (("five epochs", 5, 1), ("to the end", ctx.scaled(100, 20), ctx.scaled(8, 2))):
        found = effective_complexity(model, batch, epochs=epochs, rounds=rounds, start=64, tolerance=0.5)
        ctx.measure(arm, sound=float(found.verdict == "ok"), samples=found.samples)
