"""Compare a batched step with sequential training: losses, gradients, buffers and random streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nervure._kit import CouldNotRun


@dataclass(frozen=True)
class Step:
    """Hold what one step of all members computed, before the optimizer.

    Args:
        losses: The losses, shape (n,).
        gradients: Stacked gradients, None where a parameter is not used.
        state: The members' state after the step.
    """

    losses: Tensor
    gradients: Sequence[Tensor | None]
    state: dict[str, Any]


def check(found: Step, alone: Step, names: Sequence[str]) -> None:
    """Raise if a batched step is not the sequential one to rounding.

    Args:
        found: The batched step.
        alone: The sequential step.
        names: Names of the parameters the gradients belong to.

    Raises:
        CouldNotRun: If they differ.
    """
    close("the loss", found.losses, alone.losses)
    # A gradient that is zero but for rounding is measured by the size of the member's whole gradient.
    squares = [_norms(value) ** 2 for value in alone.gradients if value is not None]
    floor = 1e-2 * torch.stack(squares).sum(0).sqrt()
    for name, mine, other in zip(names, found.gradients, alone.gradients, strict=True):
        if mine is None or other is None:
            if mine is not other:
                raise CouldNotRun(f"only one of the two ways has a gradient of {name}")
            continue
        close(f"the gradient of {name}", mine, other, floor=floor)
    for name, value in found.state["buffers"].items():
        close(f"the buffer {name}", value, alone.state["buffers"][name])
    for one, two in zip(found.state["generators"], alone.state["generators"], strict=True):
        if not torch.equal(one, two):
            raise CouldNotRun("the random numbers drawn differ from sequential training")


def close(name: str, mine: Tensor, other: Tensor, *, floor: Tensor | float = 0.0) -> None:
    """Raise unless, member by member, |a - b| is at most a tolerance of |b| + floor and the same numbers are finite.

    Args:
        name: What is compared.
        mine: (n, ...).
        other: (n, ...).
        floor: A size below which differences do not count, shape (n,).

    Raises:
        CouldNotRun: If they differ.
    """
    tolerance = 5e-2 if mine.dtype.itemsize < 4 else 1e-7 if mine.dtype == torch.float64 else 1e-3
    mine, other = mine.detach().reshape(len(mine), -1), other.detach().reshape(len(other), -1)
    if mine.shape != other.shape or not torch.equal(mine.isfinite(), other.isfinite()):
        raise CouldNotRun(f"{name} differs from sequential training in shape or in what is finite")
    gap = _norms(torch.where(mine.isfinite(), mine.double() - other.double(), 0))
    if bool((gap > tolerance * (_norms(other) + floor) + 1e-30).any()):
        raise CouldNotRun(f"{name} differs from sequential training by more than {tolerance:g}")


def _norms(value: Tensor) -> Tensor:
    """Return the length of each member's finite numbers."""
    value = value.detach().double()
    return torch.where(value.isfinite(), value, 0).flatten(1).norm(dim=1)
