"""The training every entrant of a comparison shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from nervure import data as data_sets
from nervure.core import forward, rng
from nervure.core.distillation import distillation
from nervure.data import Splits
from nervure.learn import Loop, cross_entropy

BATCH = 64


class PruneTask:
    """Give every entrant the same data, batches, loss, optimizer and learning-rate schedule.

    Args:
        data: The data set.
        rate: The learning rate at the start of each training; annealed to zero by a cosine.
        seed: Decides the batches.
        tick: Called after every optimizer step.
        teacher: Class scores of a teacher for every training sample, from which trainings are then distilled; or None.
    """

    def __init__(
        self, data: Splits, *, rate: float, seed: int, tick: Callable[[], None], teacher: Tensor | None = None
    ) -> None:
        self.data, self.rate, self.seed, self.tick, self.teacher = data, rate, seed, tick, teacher

    def batches(self, count: int) -> Sequence[Any]:
        """Return `count` calibration batches of 256 samples, the same ones at every call."""
        size = min(256, len(self.data.train_x))
        draw = rng.generator("calibration", self.seed)
        order = torch.randperm(len(self.data.train_x), generator=draw)
        return [(self.data.train_x[part], self.data.train_y[part]) for part in order.split(size)[:count]]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        return cross_entropy(forward.call(model, batch[0]), batch[1])

    def train(
        self,
        model: nn.Module,
        *,
        steps: int,
        part: int = 0,
        after_step: Callable[[int], None] | None = None,
        optimizer: Callable[[nn.Module, torch.optim.Optimizer], torch.optim.Optimizer] | None = None,
    ) -> None:
        """Train in place; optimizer and schedule start anew, batches depend on (seed, part) only."""
        if not steps:
            return
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        made: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=self.rate)
        if optimizer is not None:
            made = optimizer(model, made)
        teacher, labels = self.teacher, self.data.train_y

        def distilled(outputs: Any, places: Tensor) -> Tensor:
            return distillation(forward.logits(outputs), teacher[places], labels[places])  # type: ignore[index]

        loop = Loop(
            model,
            made,
            (self.data.train_x, labels if teacher is None else torch.arange(len(labels))),
            loss=None if teacher is None else distilled,
            batch_size=BATCH,
            schedule=CosineAnnealingLR(made, steps),
            hooks=[_Step(self.tick, after_step)],
            seed=rng.seed_for("order", self.seed, part),
        )
        loop.run(steps)

    def parts(self, count: int, *, by: Literal["class", "chance"], seed: int) -> list[PruneTask]:
        """Return tasks on disjoint parts of the training data."""
        tasks = []
        for place in data_sets.parts(self.data.train_y, count, by=by, seed=seed):
            part = replace(self.data, train_x=self.data.train_x[place], train_y=self.data.train_y[place])
            teacher = None if self.teacher is None else self.teacher[place]
            tasks.append(PruneTask(part, rate=self.rate, seed=self.seed, tick=self.tick, teacher=teacher))
        return tasks


class _Step:
    def __init__(self, tick: Callable[[], None], also: Callable[[int], None] | None) -> None:
        self.tick, self.also = tick, also

    def after_step(self, step: int) -> None:
        self.tick()
        if self.also is not None:
            self.also(step)
