"""Masks that are sampled or ranked, each times one learnt scale a layer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from nervure.compress import supermask
from nervure.core import rng


class _Gumbel(torch.autograd.Function):
    """Keep where log-odds plus logistic noise is positive; the gradient is that of the sigmoid of their sum / tau."""

    @staticmethod
    def forward(ctx: Any, odds: Tensor, uniform: Tensor, tau: float) -> Tensor:
        noisy = torch.logit(uniform, eps=2.0**-25).add_(odds)
        kept = (noisy >= 0).to(odds.dtype)
        ctx.tau = tau
        ctx.save_for_backward(noisy.div_(tau).sigmoid_())
        return kept

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (soft,) = ctx.saved_tensors
        return outer[0] * soft * (1 - soft) / ctx.tau, None, None


class _Bernoulli(torch.autograd.Function):
    """Keep with the probability sigmoid(score), whose gradient stands in for the sample's."""

    @staticmethod
    def forward(ctx: Any, odds: Tensor, uniform: Tensor, tau: float) -> Tensor:
        share = torch.sigmoid(odds / tau)
        ctx.tau = tau
        ctx.save_for_backward(share)
        return (uniform < share).to(odds.dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (share,) = ctx.saved_tensors
        return outer[0] * share * (1 - share) / ctx.tau, None, None


class _Top(torch.autograd.Function):
    """Keep the `count` largest magnitudes; the gradient passes straight through to the magnitude."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, count: int) -> Tensor:
        kept = torch.zeros_like(scores).flatten()
        kept[scores.abs().flatten().topk(count, sorted=False).indices] = 1
        ctx.save_for_backward(scores)
        return kept.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (scores,) = ctx.saved_tensors
        return outer[0] * scores.sign(), None


class Scaled(supermask.Mask):
    """Multiply a topology by one learnt number, the layer's smart rescale; or by a fixed 1.

    Args:
        frozen: As in `supermask.Mask`.
        scores: As in `supermask.Mask`.
        rescale: Whether the number is learnt.
    """

    def __init__(self, frozen: Tensor, scores: Tensor, *, rescale: bool) -> None:
        super().__init__(frozen, scores)
        self.scale = nn.Parameter(torch.ones((), device=frozen.device, dtype=frozen.dtype), requires_grad=rescale)

    def mask(self, scores: Tensor) -> Tensor:
        """Return the topology times the scale."""
        return self.topology(scores) * self.scale

    def topology(self, scores: Tensor) -> Tensor:
        """Return zeros and ones, with the gradient of their straight-through estimate.

        Raises:
            NotImplementedError: Where a subclass does not say which.
        """
        raise NotImplementedError("a subclass defines topology(scores)")


_RULES: dict[str, type[torch.autograd.Function]] = {"gumbel": _Gumbel, "bernoulli": _Bernoulli}


class Sampled(Scaled):
    """Sample by the scores, as log-odds, in train mode and take the more probable choice in eval mode.

    The number of draws so far is a buffer and makes each draw's seed: copies and loaded states go on alike.

    Args:
        frozen: As in `supermask.Mask`; log-odds start at 0.
        rule: Whose gradient stands in for the sample's.
        temperature: Above 0.
        rescale: As in `Scaled`.
        seed: Draws the topologies.
    """

    draws: Tensor

    def __init__(
        self, frozen: Tensor, *, rule: Literal["gumbel", "bernoulli"], temperature: float, rescale: bool, seed: int
    ) -> None:
        super().__init__(frozen, torch.zeros_like(frozen), rescale=rescale)
        self.rule, self.temperature, self.seed = _RULES[rule], temperature, seed
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def topology(self, scores: Tensor) -> Tensor:
        """Return a sample, or in eval mode the more probable choice."""
        if not self.training:
            return (scores >= 0).to(scores.dtype)
        draw = torch.Generator(scores.device).manual_seed(rng.seed_for("topology", self.seed, int(self.draws)))
        self.draws += 1
        uniform = torch.rand(scores.shape, generator=draw, device=scores.device, dtype=scores.dtype)
        kept: Tensor = self.rule.apply(scores, uniform, self.temperature)
        return kept


class Ranked(Scaled):
    """Keep a fixed share of a layer's weights: those of the largest scores in magnitude.

    Args:
        frozen: As in `supermask.Mask`.
        scores: As in `supermask.Mask`.
        density: The share, in (0, 1].
        rescale: As in `Scaled`.
    """

    def __init__(self, frozen: Tensor, scores: Tensor, *, density: float, rescale: bool) -> None:
        super().__init__(frozen, scores, rescale=rescale)
        self.count = max(1, round(density * frozen.numel()))

    def topology(self, scores: Tensor) -> Tensor:
        """Return ones at the top, zeros elsewhere."""
        kept: Tensor = _Top.apply(scores, self.count)
        return kept
