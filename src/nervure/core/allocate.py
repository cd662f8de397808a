"""Turn scores into masks: which weights stay at a given share."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nervure._kit import BadData


def drop_smallest(scores: Tensor, mask: Tensor, count: int) -> Tensor:
    """Drop the `count` smallest scores among those still alive.

    Ties are broken as `torch.topk` breaks them on the flattened alive scores, which is also what
    ``torch.nn.utils.prune`` does.

    Args:
        scores: Scores of any shape.
        mask: Boolean, same shape; false is already dropped.
        count: How many to drop, at most as many as are alive.

    Returns:
        The new mask.

    Raises:
        BadData: If a score of a living weight is NaN.
    """
    alive = mask.reshape(-1).nonzero().squeeze(1)
    living = scores.reshape(-1)[alive]
    if torch.isnan(living).any():
        raise BadData("the scores contain NaN", found=f"{int(torch.isnan(living).sum())} of {living.numel()}")
    new = mask.reshape(-1).clone()
    if count > 0:
        new[alive[torch.topk(living, min(count, len(living)), largest=False).indices]] = False
    return new.reshape(mask.shape)


def globally(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], *, density: float) -> dict[str, Tensor]:
    """Keep the share `density` of all weights with the largest scores, wherever they are.

    Args:
        scores: Name -> scores.
        masks: Name -> present mask.
        density: Share of all weights to keep, in (0, 1].

    Returns:
        Name -> mask with round(density * total) weights in all (at least one).
    """
    total = sum(mask.numel() for mask in masks.values())
    alive = sum(int(mask.sum()) for mask in masks.values())
    flat_scores = torch.cat([scores[name].reshape(-1) for name in masks])
    flat_masks = torch.cat([mask.reshape(-1) for mask in masks.values()])
    new = drop_smallest(flat_scores, flat_masks, alive - max(1, round(density * total)))
    parts = new.split([mask.numel() for mask in masks.values()])
    return {name: part.reshape(masks[name].shape) for name, part in zip(masks, parts, strict=True)}


def layerwise(
    scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], *, densities: Mapping[str, float]
) -> dict[str, Tensor]:
    """Keep in each layer its own share of weights.

    Args:
        scores: Name -> scores.
        masks: Name -> present mask.
        densities: Name -> share of the layer's weights to keep, in (0, 1].

    Returns:
        Name -> mask; at least one weight of each layer stays.
    """
    return {
        name: drop_smallest(scores[name], mask, int(mask.sum()) - max(1, round(densities[name] * mask.numel())))
        for name, mask in masks.items()
    }


def uniform_densities(sizes: Mapping[str, int], *, density: float, head: str | None, rounds: int) -> dict[str, float]:
    """Share a total density over layers so that all lose one rate a round, the output layer half of it.

    Solves ``sum_l n_l (1-p)^r + n_head (1-p/2)^r = density * n`` for the rate p.

    Args:
        sizes: Name -> number of weights.
        density: Share of all weights to keep, in (0, 1].
        head: Name of the output layer's weight, or None.
        rounds: Number of rounds r the rate applies to, at least 1.

    Returns:
        Name -> share to keep.

    Example:
        >>> shares = uniform_densities({"a": 1000, "head": 100}, density=0.1, head="head", rounds=4)
        >>> round(1000 * shares["a"] + 100 * shares["head"])
        110
    """
    total = sum(sizes.values())

    def shares(rate: float) -> dict[str, float]:
        return {name: (1 - (rate / 2 if name == head else rate)) ** rounds for name in sizes}

    low, high = 0.0, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        kept = sum(share * sizes[name] for name, share in shares(middle).items())
        low, high = (middle, high) if kept > density * total else (low, middle)
    found = shares((low + high) / 2)
    # A head too large to reach the total at half rate: everything is shared alike.
    reached = sum(share * sizes[name] for name, share in found.items())
    if not math.isclose(reached, density * total, rel_tol=1e-6):
        return dict.fromkeys(sizes, density)
    return found
