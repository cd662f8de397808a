"""The concrete `Ctx` a claim receives: data, models, training and measurements of one seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nervure import zoo
from nervure._kit import OverBudget
from nervure.core import rng
from nervure.data import Splits, load
from nervure.learn import Loop, accuracy
from nervure.spec import Measurement

Progress = Callable[[float, str], None]


class Context:
    """Give a claim what it may use for one seed, and keep what it measures.

    Args:
        claim_id: The claim's id: part of every derived seed.
        seed: The seed.
        quick: Whether this is a scaled-down rehearsal.
        data: Name or path that replaces the claim's own data set, or None.
        seconds: Time limit, or None.
        progress: Called with (share done, text).
    """

    def __init__(
        self,
        claim_id: str,
        seed: int,
        *,
        quick: bool = False,
        data: str | None = None,
        seconds: float | None = None,
        progress: Progress = lambda share, text: None,
    ) -> None:
        self.claim_id, self.seed, self.quick = claim_id, seed, quick
        self.measurements: list[Measurement] = []
        self.warnings: list[str] = []
        self.steps = 0
        self._data, self._seconds, self._progress = data, seconds, progress
        self._planned, self._start = 0, time.monotonic()

    def data(self, name: str, *, train: int | None = None, test: int | None = None, validation: int = 0) -> Splits:
        """Return a data set, its splits drawn by this seed; see `nervure.spec.Ctx`."""
        return load(self._data or name, seed=self.seed, train=train, test=test, validation=validation)

    def model(self, name: str, *, data: Any = None, draw: str = "first", **options: Any) -> nn.Module:
        """Build a zoo model, its weights drawn by this seed; see `nervure.spec.Ctx`."""
        seed = self.seed_for("model", name, draw)
        if data is not None:
            return zoo.build(name, shape=tuple(data.train_x.shape[1:]), classes=data.classes, seed=seed)
        return zoo.case(name).model(seed=seed, **options)

    def generator(self, *tags: object) -> torch.Generator:
        """Return a CPU generator that depends on (claim, seed, tags) only."""
        return torch.Generator().manual_seed(self.seed_for(*tags))

    def seed_for(self, *tags: object) -> int:
        """Return an integer seed that depends on (claim, seed, tags) only."""
        return rng.seed_for(self.claim_id, self.seed, *tags)

    def train(
        self,
        model: nn.Module,
        data: Any,
        *,
        steps: int,
        batch_size: int = 64,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
        hooks: Iterable[object] = (),
        order: object = "order",
    ) -> nn.Module:
        """Train in place for `steps` optimizer steps; see `nervure.spec.Ctx`."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        made = optimizer(parameters) if optimizer else torch.optim.Adam(parameters, lr=1.2e-3, fused=True)
        loop = Loop(
            model,
            made,
            (data.train_x, data.train_y),
            loss=loss,
            batch_size=batch_size,
            schedule=schedule(made) if schedule else None,
            hooks=[*hooks, _Tick(self)],
            seed=self.seed_for(order),
        )
        loop.run(steps)
        return model

    def accuracy(self, model: nn.Module, x: Tensor, y: Tensor) -> float:
        """Return the share of right answers, in eval mode."""
        return accuracy(model, x, y)

    def measure(self, arm: str, *, step: float | None = None, **metrics: float) -> None:
        """Record numbers of an arm; with `step`, a point of a curve."""
        for metric, value in metrics.items():
            self.measurements.append(Measurement(arm=arm, metric=metric, value=float(value), step=step))

    def plan(self, steps: int) -> None:
        """Say how many training steps this job takes in all."""
        self._planned = steps

    def progress(self, done: float, total: float, what: str = "") -> None:
        """Say how far this job is; the place where an exhausted time budget is noticed.

        Raises:
            OverBudget: If the job's seconds are used up.
        """
        spent = time.monotonic() - self._start
        if self._seconds is not None and spent > self._seconds:
            raise OverBudget(
                "the job used up its time", expected=f"at most {self._seconds:.0f} s", found=f"{spent:.0f} s"
            )
        self._progress(min(1.0, done / total) if total else 0.0, what)

    def scaled(self, full: Any, quick: Any) -> Any:
        """Return `full`, or `quick` when the run is a rehearsal."""
        return quick if self.quick else full


class _Tick:
    """Count the context's training steps and report progress now and then."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def after_step(self, step: int) -> None:
        self.context.steps += 1
        if self.context.steps % 50 == 0:
            planned = self.context._planned or self.context.steps * 2
            self.context.progress(self.context.steps, planned, f"step {self.context.steps:,}")
