"""The subset of some numbers whose sum is closest to a target: exact, by meeting in the middle, many at once."""

from __future__ import annotations

import torch
from torch import Tensor

from nervure._kit import UsageError

MOST = 40
_CELLS = 1 << 22  # entries of a table of half sums held at a time


def subset_sum(candidates: Tensor, targets: Tensor) -> Tensor:
    """Return, for every target, the subset of its candidates with the sum closest to it.

    Argmin over subsets S of |sum of S - target|, the empty one included, in 2^(n/2) steps: all sums of the second
    half are sorted, and for each sum of the first half the two neighbours of what is missing are looked up.

    Args:
        candidates: Shape (..., n) with n at most 40.
        targets: Shape (...).

    Returns:
        Boolean, shape (..., n).

    Raises:
        UsageError: If there are too many candidates, or shapes do not fit.

    Examples:
        >>> subset_sum(torch.tensor([0.5, -0.3, 0.9, 0.2]), torch.tensor(0.41)).tolist()
        [True, True, False, True]
    """
    n = candidates.shape[-1] if candidates.ndim else 0
    if n > MOST or candidates.shape[:-1] != targets.shape or not candidates.ndim:
        found = (tuple(candidates.shape), tuple(targets.shape))
        raise UsageError("no such subset sums", expected=f"shapes (..., n <= {MOST}) and (...)", found=found)
    rows, goals = candidates.detach().double().reshape(targets.numel(), n), targets.detach().double().reshape(-1)
    step = max(1, _CELLS >> (n - n // 2))
    parts = [_solve(rows[i : i + step], goals[i : i + step]) for i in range(0, len(rows), step)]
    return torch.cat(parts).view(candidates.shape) if parts else torch.zeros(candidates.shape, dtype=torch.bool)


def _solve(rows: Tensor, goals: Tensor) -> Tensor:
    half = rows.shape[-1] // 2
    left, right = _sums(rows[:, :half]), _sums(rows[:, half:])
    ordered, order = right.sort(1)
    missing = goals[:, None] - left
    above = torch.searchsorted(ordered, missing).clamp_(max=ordered.shape[1] - 1)
    below = (above - 1).clamp_(min=0)
    gaps = torch.stack([(ordered.gather(1, place) - missing).abs() for place in (below, above)])
    nearer = gaps.argmin(0)
    first = gaps.amin(0).argmin(1, keepdim=True)  # the best subset of the first half
    place = torch.where(nearer.gather(1, first) == 0, below.gather(1, first), above.gather(1, first))
    second = order.gather(1, place)
    return torch.cat([_bits(first, half), _bits(second, rows.shape[-1] - half)], 1)


def _sums(rows: Tensor) -> Tensor:
    """Return the sums of all subsets; bit i of a column's number says whether entry i is in."""
    sums = rows.new_zeros(len(rows), 1)
    for column in rows.unbind(1):
        sums = torch.cat([sums, sums + column[:, None]], 1)
    return sums


def _bits(numbers: Tensor, count: int) -> Tensor:
    return (numbers >> torch.arange(count, device=numbers.device)) & 1 == 1
