"""The task of a claim: training by its context."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from nervure.spec import Ctx, Data


class ClaimTask:
    """Let a claim train through its context, as a pruner's task.

    Args:
        ctx: The claim's context.
        data: The data set.
        cosine: Whether each training anneals its learning rate to zero by a cosine; constant otherwise.
        optimizer: From parameters to the optimizer of each training; the context's own when None.
        hooks: From (model, number of the training) to the training's hooks.
    """

    def __init__(
        self,
        ctx: Ctx,
        data: Data,
        *,
        cosine: bool = False,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        hooks: Callable[[nn.Module, int], list[object]] | None = None,
    ) -> None:
        self.ctx, self.data, self.cosine, self.optimizer, self.hooks = ctx, data, cosine, optimizer, hooks

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Return `count` calibration batches of 256 samples, the same ones at every call."""
        size = 256
        return [
            (self.data.train_x[start : start + size], self.data.train_y[start : start + size])
            for start in range(0, count * size, size)
        ]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def train(
        self,
        model: nn.Module,
        *,
        steps: int,
        part: int = 0,
        after_step: Callable[[int], None] | None = None,
        optimizer: Callable[[nn.Module, torch.optim.Optimizer], torch.optim.Optimizer] | None = None,
    ) -> None:
        """Train in place; every part sees the same batches, as a rewound training must."""
        hooks = self.hooks(model, part) if self.hooks else []
        make = self.optimizer
        if optimizer is not None:
            base, wrap = make or _adam, optimizer

            def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
                return wrap(model, base(parameters))

        self.ctx.train(
            model,
            self.data,
            steps=steps,
            optimizer=make,
            schedule=(lambda made: CosineAnnealingLR(made, steps)) if self.cosine else None,
            hooks=[*hooks, *_after(after_step)],
        )

    def parts(self, count: int, *, by: Literal["class", "chance"], seed: int) -> list[ClaimTask]:
        """Return tasks on disjoint parts of the training data."""
        shares = self.data.parts(count, by=by, seed=seed)
        return [
            ClaimTask(self.ctx, share, cosine=self.cosine, optimizer=self.optimizer, hooks=self.hooks)
            for share in shares
        ]


def _adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer a context makes of its own."""
    return torch.optim.Adam(parameters, lr=1.2e-3, fused=True)


class _After:
    """Turn a function into a hook."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self.after_step = function


def _after(function: Callable[[int], None] | None) -> list[object]:
    return [] if function is None else [_After(function)]
