"""One data set, split once into training, validation and test, checked and scaled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nervure._kit import BadData, UsageError
from nervure.core import rng


@dataclass(frozen=True)
class Splits:
    """Hold a classification data set.

    Args:
        name: Its name.
        classes: Number of classes.
        train_x: Training inputs, shape (N, ...), float32; int64 where they are tokens.
        train_y: Training labels, shape (N,), int64 in [0, classes).
        validation_x: Validation inputs; may be empty.
        validation_y: Validation labels.
        test_x: Test inputs.
        test_y: Test labels.
    """

    name: str
    classes: int
    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one sample."""
        return tuple(self.train_x.shape[1:])

    def flat(self) -> Splits:
        """Return the same data with every sample as one vector."""
        return replace(
            self,
            train_x=self.train_x.flatten(1),
            validation_x=self.validation_x.flatten(1),
            test_x=self.test_x.flatten(1),
        )

    def parts(self, count: int, *, by: Literal["class", "chance"], seed: int) -> list[Splits]:
        """Return the same data with disjoint parts of the training samples; see `parts`."""
        places = parts(self.train_y, count, by=by, seed=seed)
        return [replace(self, train_x=self.train_x[place], train_y=self.train_y[place]) for place in places]


def parts(y: Tensor, count: int, *, by: Literal["class", "chance"], seed: int) -> list[Tensor]:
    """Cut samples into disjoint parts.

    Args:
        y: Labels, shape (N,).
        count: Number of parts, at least 1.
        by: ``"class"`` gives every part whole classes, ``"chance"`` samples by chance.
        seed: Draws who comes where.

    Returns:
        Places of each part's samples, in rising order.

    Raises:
        UsageError: If there are fewer classes or samples than parts.

    Examples:
        >>> y = torch.tensor([0, 1, 2, 3, 0, 1])
        >>> sorted(len(part) for part in parts(y, 2, by="chance", seed=0))
        [3, 3]
    """
    draw = rng.generator("parts", by, seed)
    groups = torch.unique(y) if by == "class" else torch.arange(len(y))
    if not 1 <= count <= len(groups):
        raise UsageError(f"{count} parts cannot be made", expected=f"1 to {len(groups)} by {by}")
    shares = groups[torch.randperm(len(groups), generator=draw)].tensor_split(count)
    if by == "class":
        return [torch.isin(y, share.to(y.device)).nonzero().squeeze(1) for share in shares]
    return [share.sort().values for share in shares]


@dataclass(frozen=True)
class Arrays:
    """Hold raw arrays before they are split.

    Args:
        name: The data set's name.
        x: Inputs, shape (N, ...).
        y: Labels, shape (N,).
        test_x: The official test inputs, or None where the test part is to be drawn.
        test_y: The official test labels.
        tokens: Whether the inputs are numbers of tokens, which are never scaled.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray | None = None
    test_y: np.ndarray | None = None
    tokens: bool = False


def check(arrays: Arrays) -> Arrays:
    """Check shapes, types and label range.

    Args:
        arrays: The raw arrays.

    Returns:
        The arrays, labels as int64.

    Raises:
        BadData: With what was expected and found.
    """
    parts = [(arrays.x, arrays.y, "training")]
    if arrays.test_x is not None and arrays.test_y is not None:
        parts.append((arrays.test_x, arrays.test_y, "test"))
    for x, y, part in parts:
        where = f"the {part} part of {arrays.name}"
        if x.ndim < 2 or len(x) == 0:
            raise BadData(f"{where} has no samples", expected="inputs of shape (N, ...), N > 0", found=x.shape)
        if y.ndim != 1 or len(y) != len(x):
            raise BadData(f"the labels of {where} do not fit", expected=f"shape ({len(x)},)", found=y.shape)
        if not (np.issubdtype(x.dtype, np.number) or x.dtype == bool):
            raise BadData(
                f"{where} is not numeric", expected="numbers", found=x.dtype, try_="encode text columns first"
            )
        if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
            count = int((~np.isfinite(x)).sum())
            raise BadData(f"{where} has {count} missing or infinite values", try_="filling or dropping them first")
        if not np.issubdtype(y.dtype, np.integer):
            raise BadData(f"the labels of {where} are not integers", expected="class numbers", found=y.dtype)
        if int(y.min()) < 0:
            raise BadData(f"the labels of {where} are out of range", expected="0 to classes - 1", found=int(y.min()))
    present = np.unique(arrays.y)
    classes = int(present.max()) + 1
    if len(present) < 2:
        raise BadData(f"{arrays.name} has one class only", expected="at least two", found=present.tolist())
    if arrays.test_y is not None and int(arrays.test_y.max()) >= classes:
        raise BadData(
            f"the test labels of {arrays.name} are out of range",
            expected=f"0 to {classes - 1}, as in training",
            found=int(arrays.test_y.max()),
        )
    return arrays


def split(
    arrays: Arrays, *, seed: int, train: int | None = None, test: int | None = None, validation: int = 0
) -> Splits:
    """Draw training, validation and test parts by seed and scale them by the training part's statistics.

    Images (samples with more than one axis) are shifted and scaled by one mean and one standard deviation,
    tables column by column; tokens stay as they are.

    Args:
        arrays: The raw arrays; an official test part is kept apart.
        seed: Decides which samples go where.
        train: Number of training samples, or None for all that remain.
        test: Number of test samples, or None for the official part, or a fifth where there is none.
        validation: Number of validation samples, taken from the training part.

    Returns:
        The splits.

    Raises:
        BadData: If there are fewer samples than asked for.
    """
    check(arrays)
    count = len(arrays.x)
    order = torch.randperm(count, generator=rng.generator("split", arrays.name, seed)).numpy()
    if arrays.test_x is None or arrays.test_y is None:
        held = test if test is not None else count // 5
        test_x, test_y, order = arrays.x[order[:held]], arrays.y[order[:held]], order[held:]
    else:
        pick = torch.randperm(len(arrays.test_x), generator=rng.generator("test", arrays.name, seed)).numpy()
        test_x, test_y = arrays.test_x[pick[:test]], arrays.test_y[pick[:test]]
    wanted = validation + (train or 1)
    if wanted > len(order) or len(test_x) == 0:
        raise BadData(
            f"{arrays.name} is too small", expected=f"{wanted} samples besides the test part", found=len(order)
        )
    held_out, rest = order[:validation], order[validation:]
    kept = rest[:train]
    scale = _as_tokens if arrays.tokens else _scaler(arrays.x[kept])
    return Splits(
        arrays.name,
        int(arrays.y.max()) + 1,
        scale(arrays.x[kept]),
        torch.from_numpy(arrays.y[kept].astype(np.int64)),
        scale(arrays.x[held_out]),
        torch.from_numpy(arrays.y[held_out].astype(np.int64)),
        scale(test_x),
        torch.from_numpy(test_y.astype(np.int64)),
    )


def _as_tokens(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.int64))


class _scaler:  # noqa: N801 - a function with a memory
    """Scale by the statistics of the training part."""

    def __init__(self, x: np.ndarray) -> None:
        axes = None if x.ndim > 2 else 0
        self.mean = x.mean(axis=axes, dtype=np.float64)
        spread = np.asarray(x.std(axis=axes, dtype=np.float64))
        self.spread = np.where(spread > 0, spread, 1.0)

    def __call__(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray((x - self.mean) / self.spread, dtype=np.float32))
