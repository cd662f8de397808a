"""A model bound to its loss and data, for diagnostics that may look and not touch, within a budget of seconds."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nervure._kit import BadData, BadModel, CouldNotRun, OverBudget, Unsupported, seconds_text
from nervure.core.capture import undisturbed
from nervure.core.forward import batch_size, outputs, take
from nervure.core.graph import Stage
from nervure.core.persample import Loss
from nervure.core.vectors import select
from nervure.spec import Batch

LEAST = 16


class Probe:
    """Bind a model, its loss and its data once, and run diagnostics on them.

    Diagnostics see a copy in eval mode and at least single precision; the model itself is never run. Every run is
    checked: a diagnostic that changed the copy's parameters, buffers, gradients, modes or hooks is an error. The cost
    of one gradient is measured once, so that a run can be sized to the seconds that are left.

    Args:
        model: The model.
        data: All (inputs, targets); parts of it are drawn without replacement.
        loss: From (output, targets) of a batch to its mean loss.
        parameters: Names or prefixes; None takes all that require a gradient.
        seconds: Budget of all runs together.
        seed: Draws the samples, and is handed to every diagnostic.

    Raises:
        BadModel: If the model cannot be copied or has no parameter.
        BadData: If there are no samples, or the loss is not one finite number.
        Unsupported: If a parameter is complex.

    Examples:
        >>> from nervure.inspect import m_coherence
        >>> x, y = torch.randn(64, 4), torch.randint(2, (64,))
        >>> probe = Probe(nn.Linear(4, 2), (x, y), loss=nn.functional.cross_entropy)
        >>> probe.run(m_coherence, probe.batch(gradients=4)).whole.m
        64
    """

    def __init__(
        self,
        model: nn.Module,
        data: Batch,
        *,
        loss: Loss,
        parameters: Iterable[str] | None = None,
        seconds: float = 100.0,
        seed: int = 0,
    ) -> None:
        self.model, self.notes = _copied(model)
        self.loss, self.seed, self.seconds = loss, seed, seconds
        self.parameters = list(select(self.model, parameters))
        self.count = batch_size(data[0])
        if not self.count or len(data[1]) != self.count:
            raise BadData("inputs and targets differ in number, or are none", expected=self.count, found=len(data[1]))
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))
        self.data = (take(data[0], order), take(data[1], order))
        self._began = time.monotonic()
        self._require_scalar_loss()

    def _require_scalar_loss(self) -> None:
        inputs, targets = self.first(LEAST)
        with torch.no_grad(), undisturbed(self.model), torch.no_grad():
            value = self.loss(outputs(self.model, inputs), targets)
        if value.ndim:
            raise BadData("the loss is not one number", expected="a scalar", found=tuple(value.shape), try_=".mean()")
        if not bool(value.isfinite()):
            raise BadData("the loss is not finite", found=float(value), try_="looking for NaN in inputs and weights")

    @cached_property
    def gradient_seconds(self) -> float:
        """Seconds a forward and backward pass takes for one sample, in batches of some."""
        stage, least = (
            Stage(self.model, self.first(LEAST), parameters=self.parameters),
            float("inf"),
        )
        with stage.ready():
            for _ in range(3):
                start = time.perf_counter()
                graph = stage.graph(stage.batches[0][0])
                value = self.loss(graph.output, stage.batches[0][1])
                graph.pull(value, torch.ones_like(value))
                least = min(least, time.perf_counter() - start)
                if least > self.seconds / 50:
                    break
        return least / stage.samples

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.seconds - (time.monotonic() - self._began)

    def batch(
        self, *, gradients: float, share: float = 0.2, most: int = 512, least: int = LEAST, skip: int = 0
    ) -> Batch:
        """Return as many samples as a run of so many gradients may look at.

        Args:
            gradients: What the run costs, in passes forward and backward over the samples.
            share: The part of the whole budget it may take.
            most: Most samples.
            least: Fewest samples of use.
            skip: Samples at the front to leave out, such as those of an earlier batch.

        Returns:
            Inputs and targets.

        Raises:
            OverBudget: If not even the fewest can be paid for.
            BadData: If there are not so many samples.
        """
        allowed = min(share * self.seconds, self.left)
        number = min(most, int(allowed / (gradients * self.gradient_seconds)), self.count - skip)
        if self.count - skip < min(least, most):
            raise BadData("there are too few samples", expected=f"{least} or more", found=self.count - skip)
        if number < least:
            needed = least * gradients * self.gradient_seconds / share
            raise OverBudget(
                f"{least} samples take longer than the budget allows",
                expected=f"at most {seconds_text(max(0.0, allowed))}",
                found=seconds_text(least * gradients * self.gradient_seconds),
                try_=f"a budget of {needed:.0f} seconds or more",
            )
        return self._part(skip, skip + number)

    def first(self, count: int) -> Batch:
        """Return some samples whatever a gradient costs, fewer if there are not so many.

        Args:
            count: How many.

        Returns:
            Inputs and targets, those that `batch` begins with.
        """
        return self._part(0, min(count, self.count))

    def _part(self, start: int, stop: int) -> Batch:
        return take(self.data[0], slice(start, stop)), take(self.data[1], slice(start, stop))

    def run(self, diagnostic: Callable[..., Any], batch: Any, **options: Any) -> Any:
        """Run a diagnostic on the model.

        Args:
            diagnostic: Called with the model, the batch and what it takes of ``loss``, ``parameters`` and ``seed``.
            batch: One batch or a sequence of batches.
            **options: Further keyword arguments.

        Returns:
            Its report.
        """
        known = inspect.signature(diagnostic).parameters
        bound = {"loss": self.loss, "parameters": self.parameters, "seed": self.seed}
        given = {name: value for name, value in bound.items() if name in known}
        with self.untouched(getattr(diagnostic, "__name__", "the diagnostic")):
            return diagnostic(self.model, batch, **{**given, **options})

    @contextmanager
    def untouched(self, who: str) -> Iterator[None]:
        """Open a block that may look at the copy and must leave it as it is.

        Args:
            who: Who looks, for the error.

        Yields:
            Nothing.

        Raises:
            CouldNotRun: If the copy was changed.
        """
        before = _state(self.model)
        with undisturbed(self.model):
            yield
        if _state(self.model) != before:
            raise CouldNotRun(f"{who} changed the model it looked at", try_="reporting this as a bug")


def _copied(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy in eval mode and at least single precision, and what was done to it.

    Raises:
        BadModel: If it cannot be copied or has no parameter.
        Unsupported: If a parameter is complex.
    """
    if not any(True for _ in model.parameters()):
        raise BadModel("the model has no parameter", try_="running it once, if its layers are lazy")
    if any(value.is_complex() for value in model.parameters()):
        raise Unsupported("a probe", model, why="it has complex parameters")
    try:
        made = copy.deepcopy(model)
    except RuntimeError as error:
        raise BadModel("the model cannot be copied", found=str(error), try_="detaching tensors it keeps") from error
    notes = []
    if any(value.dtype in (torch.float16, torch.bfloat16) for value in made.parameters()):
        made, notes = made.float(), ["Half-precision weights were looked at in single precision."]
    if model.training:
        notes.append("The model was in training mode and is looked at in eval mode.")
    return made.eval(), tuple(notes)


def _state(model: nn.Module) -> list[Any]:
    """Return what must not change, cheaply: tensors by identity and hash, modes and numbers of hooks."""

    def mark(value: Tensor | None) -> Any:
        if value is None:
            return None
        return (
            id(value),
            torch.hash_tensor(value.detach()).view(torch.int64).item() if value.numel() else 0,
            value.requires_grad,
        )

    tensors = [mark(value) for value in model.parameters()] + [mark(value.grad) for value in model.parameters()]
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), m.training) for m in model.modules()
    ]
    return [tensors, hooks, [mark(value) for value in model.buffers()]]
