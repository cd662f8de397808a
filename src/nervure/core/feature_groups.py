"""Groups of input features: shuffled across samples, alone or all but them, and what that leaves of the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from scipy.stats import rankdata
from torch import Tensor

from nervure._kit import BadData, UsageError
from nervure.core import forward, rng

Masks = dict[str, Tensor]
MOST, COPIES = 32, 0.95
_CELLS = 4_000_000  # numbers held at once while areas are counted


@dataclass(frozen=True)
class Estimate:
    """Hold a number and its 95% bootstrap interval over samples.

    Args:
        value: On all samples.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def leaves(inputs: Any, at: str = "") -> Iterator[tuple[str, Tensor]]:
    """Walk through a batch's tensors in the order of `nervure.core.forward.tree_map`.

    Args:
        inputs: A tensor, or a tuple, list or dict of such.
        at: Path so far.

    Yields:
        Path and tensor; the path of a lone tensor is empty, that of a part its key or place.
    """
    if isinstance(inputs, Tensor):
        yield at, inputs
    elif isinstance(inputs, Mapping | tuple | list):
        parts = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
        for key, value in parts:
            yield from leaves(value, f"{at}.{key}" if at else str(key))


def masks(inputs: Any, groups: Mapping[str, Any]) -> dict[str, Masks]:
    """Turn groups of features into masks over one sample.

    Args:
        inputs: A batch's inputs.
        groups: Name -> place. A place is a boolean mask over a sample, or whatever indexes one: a list of columns, a
            slice, a tuple of slices. Where the inputs are a tuple or dict, it is a dict of part -> place.

    Returns:
        Name -> path of the part -> boolean mask of one sample's shape.

    Raises:
        UsageError: If a place lies outside the inputs or holds no feature.

    Examples:
        >>> masks(torch.zeros(4, 3), {"ends": [0, 2]})["ends"][""].tolist()
        [True, False, True]
    """
    known = {path: part for path, part in leaves(inputs) if _batched(part, inputs)}
    made: dict[str, Masks] = {}
    for name, place in groups.items():
        parts = {str(key): one for key, one in place.items()} if isinstance(place, Mapping) else {"": place}
        if not set(parts) <= set(known):
            raise UsageError(f"the group {name!r} names no part of the inputs", expected=sorted(known),
                             found=sorted(parts))  # fmt: skip
        made[name] = {path: _mask(known[path], one, name) for path, one in parts.items()}
        if not any(bool(mask.any()) for mask in made[name].values()):
            raise UsageError(f"the group {name!r} is empty", expected="one feature or more")
    return made


def _batched(part: Tensor, inputs: Any) -> bool:
    return part.ndim > 0 and len(part) == forward.batch_size(inputs)


def _mask(part: Tensor, place: Any, name: str) -> Tensor:
    shape = part.shape[1:]
    if isinstance(place, Tensor) and place.dtype == torch.bool:
        if place.shape != shape:
            raise UsageError(f"the mask of {name!r} does not fit", expected=tuple(shape), found=tuple(place.shape))
        return place.to(part.device)
    made = torch.zeros(shape, dtype=torch.bool, device=part.device)
    try:
        made[place] = True
    except (IndexError, TypeError) as error:
        raise UsageError(f"the place of {name!r} is outside a sample", expected=f"in {tuple(shape)}",
                         found=str(error)) from error  # fmt: skip
    return made


def default_groups(inputs: Any) -> dict[str, Masks]:
    """Cut the inputs into groups: columns of tables, regions and channels of images, positions of sequences.

    Columns whose ranks correlate by 0.95 or more are one group, for a shuffled column hides nothing while a copy of it
    stands. Images get a grid of 4 x 4 regions, and their channels where they have several; the parts of a tuple or
    dict are a group each. More than 32 columns or positions are joined to 32 runs of neighbours.

    Args:
        inputs: A batch's inputs.

    Returns:
        As `masks` gives them.

    Raises:
        BadData: If there is nothing to tell apart.

    Examples:
        >>> one = torch.randn(50)
        >>> list(default_groups(torch.stack([one, torch.randn(50), 2 * one], 1)))
        ['columns 0, 2', 'column 1']
    """
    known = {path: part for path, part in leaves(inputs) if _batched(part, inputs)}
    if len(known) > 1:
        return masks(inputs, {path: {path: ...} for path in known})
    ((path, part),) = known.items()
    places: dict[str, Any] = {}
    if part.ndim == 2 and part.is_floating_point():
        places = {_name("column", columns): columns for columns in _runs(_copies(part))}
    elif part.ndim in (2, 3):
        places = {_name("position", run): run for run in _runs([[p] for p in range(part.shape[1])])}
    elif part.ndim > 3:
        for rows in _thirds(part.shape[-2]):
            for columns in _thirds(part.shape[-1]):
                name = f"{_name('row', rows)}, {_name('column', columns)}"
                places[name] = (..., slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        if 1 < part.shape[1] <= MOST:
            places |= {f"channel {channel}": [channel] for channel in range(part.shape[1])}
    if len(places) < 2:
        raise BadData("the inputs are one group of features", expected="two or more",
                      found=f"samples of shape {tuple(part.shape[1:])}", try_="groups=")  # fmt: skip
    return masks(inputs, places if not path else {name: {path: place} for name, place in places.items()})


def _copies(table: Tensor) -> list[list[int]]:
    """Return the columns in groups of those that are monotone functions of one another, in the order of the first."""
    ranks = rankdata(table.detach().cpu().double().numpy(), axis=0)
    ranks -= ranks.mean(0)
    norms = np.linalg.norm(ranks, axis=0)
    ranks /= np.where(norms > 0, norms, 1.0)
    _, group = connected_components(np.abs(ranks.T @ ranks) >= COPIES, directed=False)
    found: dict[int, list[int]] = {}
    for column, number in enumerate(group):
        found.setdefault(int(number), []).append(column)
    return list(found.values())


def _runs(groups: list[list[int]]) -> list[list[int]]:
    if len(groups) <= MOST:
        return groups
    cuts = torch.arange(len(groups)).tensor_split(MOST)
    return [sorted(member for place in cut.tolist() for member in groups[place]) for cut in cuts]


def _thirds(length: int) -> list[list[int]]:
    return [cut.tolist() for cut in torch.arange(length).tensor_split(min(4, length))]


def _name(kind: str, members: Sequence[int]) -> str:
    if len(members) == 1:
        return f"{kind} {members[0]}"
    if members[-1] - members[0] == len(members) - 1:
        return f"{kind}s {members[0]}-{members[-1]}"
    return f"{kind}s {', '.join(map(str, members))}"


def cycle(count: int, *, seed: int = 0) -> Tensor:
    """Draw for each sample another one to take features from: one cycle through all, so that none keeps its own.

    Args:
        count: Number of samples, at least 2.
        seed: Draws it.

    Returns:
        Shape (count,).

    Raises:
        BadData: If there is one sample alone.
    """
    if count < 2:
        raise BadData("one sample cannot be shuffled", expected="two or more", found=count)
    order = torch.randperm(count, generator=rng.generator("cycle", seed))
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def shuffled(inputs: Any, group: Masks, order: Tensor, *, rest: bool = False) -> Any:
    """Take a group's features from other samples, all of them from the same one.

    Args:
        inputs: A batch's inputs.
        group: Its masks, as in `masks`.
        order: For each sample the one to take from, as in `cycle`.
        rest: Take everything but the group instead. Parts without an axis of samples stay.

    Returns:
        The same structure.

    Examples:
        >>> x = torch.tensor([[1, 10], [2, 20]])
        >>> first = masks(x, {"first": [0]})["first"]
        >>> shuffled(x, first, torch.tensor([1, 0])).tolist()
        [[2, 10], [1, 20]]
        >>> shuffled(x, first, torch.tensor([1, 0]), rest=True).tolist()
        [[1, 20], [2, 10]]
    """
    paths = iter([path for path, _ in leaves(inputs)])

    def change(part: Tensor) -> Tensor:
        mask = group.get(next(paths))
        if not _batched(part, inputs) or (mask is None and not rest):
            return part
        if mask is None:
            return part[order.to(part.device)]
        return torch.where(mask ^ rest, part[order.to(part.device)], part)

    return forward.tree_map(change, inputs)


class Answers:
    """Score a model's answers on a batch, with intervals by resampling its samples.

    Args:
        outputs: Intact class scores, shape (N, C) or (N, positions, C); (N,) or (N, 1) for the log-odds of class 1.
        targets: Classes, shape (N,) or (N, positions); negative ones do not count.
        resamples: Number of bootstrap resamples.
        seed: Draws them.

    Raises:
        BadData: If outputs and targets do not fit, or all targets are of one class.
    """

    def __init__(self, outputs: Tensor, targets: Tensor, *, resamples: int = 200, seed: int = 0) -> None:
        rows = _columns(outputs, targets)
        if targets.is_floating_point() and not bool((targets == targets.round()).all()):
            raise BadData("the targets are not classes", expected="class numbers", found=targets.dtype)
        self.targets = targets.detach().cpu().long().reshape(len(targets), -1)
        self.present = self.targets[self.targets >= 0].unique().tolist()
        if len(self.present) < 2 or self.targets.max() >= rows.shape[-1]:
            raise BadData("these targets cannot be scored", expected=f"two or more of {rows.shape[-1]} classes",
                          found=f"classes {self.present[:8]}")  # fmt: skip
        count = len(rows)
        drawn = torch.randint(count, (resamples, count), generator=rng.generator("bootstrap", seed))
        ones = torch.ones(drawn.shape, dtype=torch.float64)
        self.counts = torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(1, drawn, ones)
        self.all = torch.ones(1, count, dtype=torch.float64)
        self.intact = rows

    def accuracy(self, outputs: Tensor) -> Estimate:
        """Return the share of right answers.

        Args:
            outputs: In the intact outputs' shape.

        Returns:
            The estimate.
        """
        right = (self._rows(outputs).argmax(-1) == self.targets).double().sum(1)
        counted = (self.targets >= 0).double().sum(1)
        return self._estimate(lambda w: (w @ right) / (w @ counted))

    def auc(self, outputs: Tensor) -> Estimate:
        """Return the area under the ROC curve; of several classes, the mean over one class against the rest.

        Args:
            outputs: In the intact outputs' shape.

        Returns:
            The estimate.
        """
        rows = self._rows(outputs)
        counted = self.targets >= 0
        if rows.shape[-1] == 2:  # log-odds, which do not round to ties where an answer is sure
            scores, classes = (rows[..., 1:] - rows[..., :1])[counted], [1]
        else:
            scores, classes = rows.log_softmax(-1)[..., self.present][counted], self.present
        inside = self.targets[counted].unsqueeze(1) == torch.tensor(classes)
        owners = torch.arange(len(rows)).unsqueeze(1).expand_as(self.targets)[counted]
        return self._estimate(lambda w: _areas(scores, inside, w[:, owners]).nanmean(1))

    def change(self, outputs: Tensor) -> Estimate:
        """Return E |f' - f|^2 / (2 Var f): 0 where outputs stay, 1 where they are as another sample's.

        For independent groups it is the total Sobol index of what was shuffled. A shift of all scores does not count.

        Args:
            outputs: In the intact outputs' shape.

        Returns:
            The estimate; zeros where the intact outputs never vary.
        """
        one, two = (rows - rows.mean(-1, keepdim=True) for rows in (self.intact, self._rows(outputs)))
        moved = (two - one).square().flatten(1).sum(1)
        flat = (one - one.mean(0)).flatten(1)

        def ratio(w: Tensor) -> Tensor:
            share = w / w.sum(1, keepdim=True)
            spread = (share @ flat.square() - (share @ flat).square()).sum(1)
            return torch.where(spread > 0, (share @ moved) / (2 * spread), 0.0)

        return self._estimate(ratio)

    def _rows(self, outputs: Tensor) -> Tensor:
        return _columns(outputs, self.targets)

    def _estimate(self, score: Any) -> Estimate:
        value = float(score(self.all)[0])
        low, high = score(self.counts).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return Estimate(value, low, high)


def _areas(scores: Tensor, inside: Tensor, weights: Tensor) -> Tensor:
    """Return the areas under the ROC curves of columns (R, K) for rows of weights (B, R): pairs in order, ties by half.

    Shape (B, K); NaN where one side has no weight.
    """
    found, chunk = [], max(1, _CELLS // weights.numel())
    for part, high in zip(scores.split(chunk, 1), inside.split(chunk, 1), strict=True):
        ordered, order = part.sort(0)
        new = torch.cat([torch.zeros_like(order[:1]), (ordered[1:] > ordered[:-1]).long()]).cumsum(0)
        place = torch.empty_like(order).scatter_(0, order, new)  # equal scores share a place
        flat = (place + len(part) * torch.arange(part.shape[1])).flatten()
        spread = weights.unsqueeze(2).expand(-1, -1, part.shape[1])
        above, below = (
            torch.zeros(len(weights), part.numel(), dtype=weights.dtype)
            .index_add_(1, flat, (spread * side).flatten(1))
            .view(len(weights), part.shape[1], len(part))
            for side in (high, ~high)
        )
        pairs = above.sum(2) * below.sum(2)
        won = (above * (below.cumsum(2) - below / 2)).sum(2)
        found.append(won / torch.where(pairs > 0, pairs, torch.nan))
    return torch.cat(found, 1)


def _columns(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return class scores as float64 of shape (N, positions, C); log-odds become two columns.

    Raises:
        BadData: If outputs and targets do not fit, or outputs are not finite.
    """
    rows = outputs.detach().cpu().double()
    if rows.ndim == 1 or (rows.shape[-1] == 1 and rows.ndim == 2):
        odds = rows.reshape(len(rows), 1)
        rows = torch.stack([torch.zeros_like(odds), odds], -1)
    elif rows.ndim == 2:
        rows = rows.unsqueeze(1)
    if rows.ndim != 3 or rows.shape[0] != len(targets) or rows.shape[1] != targets[0].numel():
        raise BadData("outputs and targets do not fit", expected="(N, C) and (N,), or (N, T, C) and (N, T)",
                      found=f"{tuple(outputs.shape)} and {tuple(targets.shape)}")  # fmt: skip
    if not bool(rows.isfinite().all()):
        raise BadData("the outputs are not finite", found="NaN or infinity")
    return rows
