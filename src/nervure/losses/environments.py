"""Objectives over groups of samples: the worst group's loss (group DRO), equal losses (V-REx), equal heads (IRMv1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nervure._kit import UsageError


def group_means(losses: Tensor, groups: Tensor) -> Tensor:
    """Return the mean loss of each group that is there.

    Args:
        losses: One loss a sample, shape (N,).
        groups: Number of each sample's group, shape (N,); negative ones do not count.

    Returns:
        Shape (groups,), in rising order of their numbers.

    Raises:
        UsageError: If shapes differ or no sample counts.
    """
    if losses.shape != groups.shape or losses.ndim != 1 or not bool((groups >= 0).any()):
        raise UsageError("losses and groups do not fit", expected="shape (N,) and a group",
                         found=f"{tuple(losses.shape)} and {tuple(groups.shape)}")  # fmt: skip
    counted = groups >= 0
    place, some = groups[counted], losses[counted]
    blank = torch.zeros(int(groups.max()) + 1, dtype=losses.dtype, device=losses.device)
    sizes = blank.index_add(0, place, torch.ones_like(some))
    return blank.index_add(0, place, some)[sizes > 0] / sizes[sizes > 0]


def group_dro(losses: Tensor, groups: Tensor) -> Tensor:
    """Return the mean loss of the worst group.

    Args:
        losses: One loss a sample, shape (N,).
        groups: As in `group_means`.

    Returns:
        A scalar.

    Examples:
        >>> group_dro(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])).item()
        5.0
    """
    return group_means(losses, groups).max()


def vrex(losses: Tensor, groups: Tensor, *, strength: float = 1.0) -> Tensor:
    """Return the mean of the groups' losses and strength times their variance (over n - 1).

    Args:
        losses: One loss a sample, shape (N,).
        groups: As in `group_means`; with one group there is no variance.
        strength: At least 0.

    Returns:
        A scalar.

    Examples:
        >>> vrex(torch.tensor([1.0, 3.0]), torch.tensor([0, 1]), strength=2.0).item()
        6.0
    """
    means = group_means(losses, groups)
    return means.mean() + (strength * means.var() if len(means) > 1 else 0.0)


def irm(scores: Tensor, targets: Tensor, groups: Tensor, *, strength: float = 1.0) -> Tensor:
    """Return the mean over groups of loss + strength (d loss / d s)^2 at s = 1, s scaling the scores (IRMv1).

    Args:
        scores: Class scores, shape (N, C).
        targets: Classes, shape (N,).
        groups: As in `group_means`.
        strength: At least 0.

    Returns:
        A scalar.

    Examples:
        >>> scores, targets = torch.randn(6, 3), torch.arange(6) % 3
        >>> plain = F.cross_entropy(scores, targets)
        >>> bool(irm(scores, targets, torch.zeros(6, dtype=torch.long)) >= plain)
        True
    """
    losses = group_means(F.cross_entropy(scores, targets, reduction="none"), groups)
    # d/ds of cross-entropy at s = 1 is sum_c p_c f_c - f_y.
    pull = (scores.softmax(1) * scores).sum(1) - scores.gather(1, targets.unsqueeze(1)).squeeze(1)
    return (losses + strength * group_means(pull, groups).square()).mean()
