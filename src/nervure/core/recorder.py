"""Record measures at log-spaced steps of any training loop, and read off when something first happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nervure._kit import BadData, UsageError
from nervure.core import forward, rng
from nervure.core.persample import Loss, sample_losses

Measure = Callable[[], float | Tensor]
"""Returns a number, or a tensor with one entry per sample."""


@dataclass(frozen=True)
class Event:
    """Say when something first happened, or that it did not while one looked.

    Args:
        time: The first recorded step at which it held; where it was not observed, the last step looked at.
        observed: Whether it happened; false is called censored.
        after: The last recorded step before, at which it did not hold yet; minus infinity where there is none.
    """

    time: float
    observed: bool
    after: float = -math.inf


@dataclass(frozen=True)
class RestrictedMean:
    """Hold a mean time up to a horizon and its standard error.

    Args:
        value: The mean of min(time, horizon), in steps.
        error: Its standard error by Greenwood's formula; 0 for a single event or where nothing varies.
        observed: How many events happened by the horizon.
    """

    value: float
    error: float
    observed: int


class Recorder:
    """Call measures at some steps of a training loop of yours, and keep what they return.

    With ``every="log"`` the gap between records grows in proportion to the step, so that a run of a million steps is
    read some hundred times. Measures run under a guard that gives the global random generators back.

    Args:
        measures: Name -> function without arguments; see `accuracy_of` and `losses_of`.
        every: ``"log"``, or the number of steps between records.
        per_decade: Records between a step and ten times that step; for ``"log"``.

    Raises:
        UsageError: If there is nothing to measure, or no such spacing.

    Examples:
        >>> level = [0.0]
        >>> recorder = Recorder({"level": lambda: level[0]})
        >>> for t in range(1, 1001):
        ...     level[0] = t / 1000
        ...     _ = recorder.step(t)
        >>> len(recorder.steps), recorder.first("level", at_least=0.5).observed
        (46, True)
    """

    def __init__(
        self, measures: Mapping[str, Measure], *, every: int | Literal["log"] = "log", per_decade: int = 20
    ) -> None:
        spaced = every == "log" or (isinstance(every, int) and every >= 1)
        if not measures or not spaced or per_decade < 1:
            raise UsageError(
                "nothing can be recorded so",
                expected='a measure or more, and every="log" or a number of steps',
                found=(list(measures), every, per_decade),
            )
        self.measures, self.every, self.per_decade = dict(measures), every, per_decade
        self.steps: list[float] = []
        self._values: dict[str, list[Tensor]] = {name: [] for name in measures}

    def due(self, step: float) -> bool:
        """Return whether a step would be recorded.

        Args:
            step: The step.

        Returns:
            Whether it is the first, or far enough from the last record.
        """
        if not self.steps:
            return True
        last = self.steps[-1]
        if self.every == "log":
            return step >= max(last + 1, last * 10 ** (1 / self.per_decade))
        return step >= last + self.every

    def step(self, step: float, *, always: bool = False) -> bool:
        """Record a step if it is due.

        Args:
            step: The number of the step, at least 0 and above the last one recorded.
            always: Record in any case, as for the last step of a run.

        Returns:
            Whether it was recorded.

        Raises:
            UsageError: If time runs backwards.
        """
        if self.steps and step <= self.steps[-1]:
            if step == self.steps[-1]:
                return False
            raise UsageError("steps run backwards", expected=f"above {self.steps[-1]:g}", found=step)
        if not (always or self.due(step)):
            return False
        with rng.scope():
            found = {name: torch.as_tensor(measure()).detach() for name, measure in self.measures.items()}
        # Only a step at which every measure came through is kept.
        self.steps.append(float(step))
        for name, value in found.items():
            self._values[name].append(value.to("cpu", torch.float64, copy=True))
        return True

    def curve(self, name: str) -> Tensor:
        """Return what a measure gave.

        Args:
            name: The measure.

        Returns:
            Float64, shape (T,), or (T, N) for a measure of N samples.

        Raises:
            UsageError: If there is no such measure or no record.
        """
        if name not in self._values or not self.steps:
            raise UsageError(f"nothing is recorded as {name!r}", expected=f"one of {list(self._values)}")
        return torch.stack(self._values[name])

    def mean(self, name: str) -> Tensor:
        """Return the numbers of a measure, the mean over samples where it has many.

        Args:
            name: The measure.

        Returns:
            Float64, shape (T,).
        """
        curve = self.curve(name)
        return curve.reshape(len(curve), -1).mean(1)

    def last(self, name: str) -> float:
        """Return the last number of a measure, the mean over samples where it has many.

        Args:
            name: The measure.

        Returns:
            The number.
        """
        return float(self.mean(name)[-1])

    def first(
        self, name: str, *, at_least: float | None = None, at_most: float | None = None, lasting: int = 1
    ) -> Event:
        """Return when a measure first reached a bound.

        Args:
            name: The measure; the mean over samples is taken where it has many.
            at_least: The bound from below.
            at_most: The bound from above; exactly one of the two is given.
            lasting: Records in a row that must hold, at least 1; the first of them gives the time.

        Returns:
            The event; censored at the last recorded step.
        """
        return self._events(self.mean(name)[:, None], at_least, at_most, lasting)[0]

    def first_each(
        self, name: str, *, at_least: float | None = None, at_most: float | None = None, lasting: int = 1
    ) -> list[Event]:
        """Return when each sample first reached a bound.

        Args:
            name: A measure of N samples.
            at_least: As in `first`.
            at_most: As in `first`.
            lasting: As in `first`.

        Returns:
            N events.
        """
        curve = self.curve(name)
        return self._events(curve.reshape(len(curve), -1), at_least, at_most, lasting)

    def _events(self, curves: Tensor, at_least: float | None, at_most: float | None, lasting: int) -> list[Event]:
        if (at_least is None) == (at_most is None) or lasting < 1:
            raise UsageError("no such event", expected="one bound, lasting >= 1", found=(at_least, at_most, lasting))
        sign, bound = (1.0, at_least) if at_least is not None else (-1.0, at_most)
        assert bound is not None
        holds = sign * curves >= sign * bound
        count = len(holds) - lasting + 1
        if count < 1:
            return [Event(self.steps[-1], observed=False, after=self.steps[-1])] * curves.shape[1]
        stays = holds.unfold(0, lasting, 1).all(-1)
        places = stays.int().argmax(0).tolist()
        return [
            Event(self.steps[place], observed=True, after=self.steps[place - 1] if place else -math.inf)
            if happened
            else Event(self.steps[-1], observed=False, after=self.steps[-1])
            for place, happened in zip(places, stays.any(0).tolist(), strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the records, for a run that is resumed."""
        return {"steps": list(self.steps), "values": {name: list(each) for name, each in self._values.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Args:
            state: The records of a recorder of the same measures.

        Raises:
            UsageError: If the measures differ.
        """
        if set(state["values"]) != set(self._values):
            raise UsageError("the measures differ", expected=list(self._values), found=list(state["values"]))
        self.steps = list(state["steps"])
        self._values = {name: list(state["values"][name]) for name in self._values}


def accuracy_of(model: nn.Module, inputs: Any, targets: Tensor) -> Measure:
    """Return a measure: the share of right answers of a classifier, in eval mode, without gradients.

    Args:
        model: The model; its modes are given back.
        inputs: As in `nervure.core.forward.call`.
        targets: Classes, (N, ...); classes are the last axis of the main output.

    Returns:
        The measure.
    """

    def measure() -> float:
        answers = forward.predict(model, inputs).argmax(-1)
        if answers.shape != targets.shape:
            raise BadData("answers and targets differ in shape", expected=answers.shape, found=targets.shape)
        return float((answers == targets.to(answers.device)).double().mean())

    return measure


def losses_of(model: nn.Module, inputs: Any, targets: Any, loss: Loss) -> Measure:
    """Return a measure: the loss of every sample on its own, in eval mode, without gradients.

    Args:
        model: The model; its modes are given back.
        inputs: As in `nervure.core.forward.call`.
        targets: N targets.
        loss: From (output, targets) of a batch to a scalar.

    Returns:
        The measure; it gives shape (N,).
    """

    @torch.no_grad()
    def measure() -> Tensor:
        return sample_losses(loss, forward.predict(model, inputs), targets)

    return measure


def restricted_mean(events: Sequence[Event], horizon: float) -> RestrictedMean:
    """Return the mean of min(time, horizon), where some times are known only to be larger than seen.

    It is the area under the Kaplan-Meier curve up to the horizon. Where all runs reached the horizon this is the
    plain mean of the times cut off there.

    Args:
        events: The times of some runs.
        horizon: Up to where, in steps, above 0; where the longest time is a censored one, at most that.

    Returns:
        The mean, with its standard error.

    Raises:
        BadData: If there is no event, or the curve is not known up to the horizon.

    Examples:
        >>> restricted_mean([Event(200, True), Event(600, True), Event(1000, False)], 1000).value
        600.0
    """
    longest = max(events, key=lambda event: (event.time, not event.observed), default=None)
    if longest is None or horizon <= 0 or (longest.time < horizon and not longest.observed):
        raise BadData(
            "no mean up to this horizon",
            expected="events, and 0 < horizon <= the last step looked at",
            found=(horizon, longest),
        )
    alive, knots, observed = 1.0, [(0.0, 1.0)], 0
    terms: list[tuple[float, float]] = []
    for time in sorted({event.time for event in events if event.observed and event.time <= horizon}):
        risk = sum(event.time >= time for event in events)
        count = sum(event.observed and event.time == time for event in events)
        alive *= 1 - count / risk
        observed += count
        knots.append((time, alive))
        if risk > count:
            terms.append((time, count / (risk * (risk - count))))
    ends = [*(time for time, _ in knots[1:]), horizon]

    def area(start: float) -> float:
        return sum(share * max(0.0, end - max(begin, start)) for (begin, share), end in zip(knots, ends, strict=True))

    variance = sum(area(time) ** 2 * weight for time, weight in terms)
    return RestrictedMean(area(0.0), variance**0.5, observed)
