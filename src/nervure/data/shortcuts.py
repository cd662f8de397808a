"""Data with features of graded simplicity: slabs, parted moons, two-colour images, images in blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nervure._kit import BadData, UsageError
from nervure.core import rng
from nervure.core.shortcut_tasks import Coloured, moon, two_colours
from nervure.data.splits import Splits

__all__ = ["Coloured", "moon", "moons", "rotation", "slab_edges", "slabs", "stacked", "two_colours"]

# Number of slabs -> class -> chance of each ring of slabs, from the centre outwards.
_RINGS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    3: ((1.0, 0.0), (0.0, 1.0)),
    5: ((0.75, 0.0, 0.25), (0.0, 1.0, 0.0)),
    7: ((0.5, 0.0, 0.5, 0.0), (0.0, 0.875, 0.0, 0.125)),
}


def slab_edges(slabs: int, *, margin: float = 0.1, width: float = 1.0) -> list[tuple[float, float]]:
    """Return where the slabs of one coordinate lie: the centre one as (0, half), then rings of pairs at +-(low, high).

    Args:
        slabs: 3, 5 or 7, alternately of class 0 (the centre) and 1.
        margin: Half the gap between two slabs, as a share of `width`.
        width: All values lie in [-width, width].

    Returns:
        The range of |x| in each ring.

    Raises:
        UsageError: If there is no such coordinate.

    Examples:
        >>> [(round(low, 2), round(high, 2)) for low, high in slab_edges(5)]
        [(0.0, 0.12), (0.32, 0.56), (0.76, 1.0)]
    """
    one = (2 - 2 * (slabs - 1) * margin) / slabs
    if slabs not in _RINGS or one <= 0 or margin <= 0:
        raise UsageError("there is no such slab coordinate", expected="3, 5 or 7 slabs and small margins",
                         found=f"{slabs} slabs, margin {margin}")  # fmt: skip
    starts = [max(0.0, (ring - 0.5) * one + 2 * ring * margin) for ring in range(slabs // 2 + 1)]
    return [(start * width, (start + (one if ring else one / 2)) * width) for ring, start in enumerate(starts)]


def slabs(
    count: int = 20_000,
    *,
    test: int = 2_000,
    coordinates: Sequence[int] = (1, *(5,) * 19),
    margin: float = 0.1,
    width: float = 1.0,
    wrong: float = 0.0,
    rotation: Tensor | None = None,
    seed: int = 0,
) -> Splits:
    """Draw points of two classes whose coordinates each tell the class: some by their sign, some by alternating slabs.

    Given the class the coordinates are independent, so each alone reaches accuracy 1 (LMS-k).

    Args:
        count: Training points.
        test: Test points.
        coordinates: For each coordinate 1 (linear), or 3, 5 or 7 slabs.
        margin: Half the gap between classes, as a share of `width`.
        width: All values lie in [-width, width].
        wrong: Share of points whose linear coordinates have the other class's sign.
        rotation: Orthogonal matrix the points are multiplied by, or None; see `rotation`.
        seed: Draws everything.

    Returns:
        The points, columns in the order of `coordinates`, classes 0 and 1.

    Raises:
        UsageError: If a number is outside its range.

    Examples:
        >>> data = slabs(200, test=50, coordinates=(1, 3, 7))
        >>> bool(((data.train_x[:, 0] > 0) == data.train_y.bool()).all())
        True
    """
    if count < 1 or test < 0 or not coordinates or not 0 <= wrong <= 1 or not 0 < margin < 1:
        raise UsageError("there is no such data set", expected="points, coordinates, 0 < margin < 1, 0 <= wrong <= 1",
                         found=f"{count}, {test}, {list(coordinates)}, {margin}, {wrong}")  # fmt: skip
    draw, every = rng.generator("slabs", seed), count + test
    y = torch.randint(2, (every,), generator=draw)
    sign = 2.0 * y - 1
    flipped = torch.zeros(every, dtype=torch.bool)
    flipped[torch.randperm(every, generator=draw)[: round(wrong * every)]] = True
    columns = []
    for kind in coordinates:
        u = torch.rand(every, generator=draw)
        if kind == 1:
            columns.append(torch.where(flipped, -sign, sign) * width * (margin + (1 - margin) * u))
            continue
        edges = torch.tensor(slab_edges(kind, margin=margin, width=width))
        ring = torch.multinomial(torch.tensor(_RINGS[kind])[y], 1, generator=draw).squeeze(1)
        side = 2.0 * torch.randint(2, (every,), generator=draw) - 1
        columns.append(side * (edges[ring, 0] + (edges[ring, 1] - edges[ring, 0]) * u))
    x = torch.stack(columns, 1)
    return _splits("slabs", x if rotation is None else x @ rotation, y, test)


def rotation(size: int, *, seed: int = 0) -> Tensor:
    """Draw an orthogonal matrix, evenly over all of them.

    Args:
        size: Number of rows.
        seed: Draws it.

    Returns:
        Shape (size, size).
    """
    q, r = torch.linalg.qr(torch.randn(size, size, generator=rng.generator("rotation", seed), dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


def moons(count: int = 300, *, test: int = 1_000, gap: float = 0.1, test_gap: float = -0.3, noise: float = 0.1,
          seed: int = 0) -> Splits:  # fmt: skip
    """Draw two moons parted along the first axis, and test points where they overlap there.

    With `gap` above 0 a straight line divides the training points; the curved boundary divides both sets.

    Args:
        count: Training points.
        test: Test points.
        gap: How far each training moon lies from the axis between them; negative ones overlap.
        test_gap: The same of the test points.
        noise: Standard deviation around the half circles.
        seed: Draws the points.

    Returns:
        Points in the plane, classes 0 and 1.

    Examples:
        >>> data = moons(100, test=20)
        >>> bool(((data.train_x[:, 0] < 0) == data.train_y.bool()).all())
        True
    """
    parts = [moon(size, gap=one, noise=noise, seed=rng.seed_for("moons", seed, part))
             for part, (size, one) in enumerate(((count, gap), (test, test_gap)))]  # fmt: skip
    return _splits("moons", torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]), test)


def _splits(name: str, x: Tensor, y: Tensor, test: int) -> Splits:
    train = len(x) - test
    return Splits(name, 2, x[:train], y[:train], x[:0], y[:0], x[train:], y[train:])


def stacked(simple: tuple[Tensor, Tensor], complex_: tuple[Tensor, Tensor], *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Put an easy image above a hard one of the same class, each pair drawn by chance.

    Args:
        simple: Images (N, C, H, W) and their classes.
        complex_: Images (M, C, H, W) and their classes.
        seed: Draws the pairs.

    Returns:
        Images of shape (K, C, 2 H, W) and their classes; of each class as many as the scarcer source has.

    Raises:
        BadData: If the images differ in shape or share no class.

    Examples:
        >>> easy, hard = torch.zeros(4, 1, 5, 5), torch.ones(6, 1, 5, 5)
        >>> stacked((easy, torch.arange(4) % 2), (hard, torch.arange(6) % 2))[0].shape
        torch.Size([4, 1, 10, 5])
    """
    draw = rng.generator("stacked", seed)
    if simple[0].shape[1:] != complex_[0].shape[1:]:
        raise BadData("the images differ in shape", expected=tuple(simple[0].shape[1:]),
                      found=tuple(complex_[0].shape[1:]))  # fmt: skip
    pairs, labels = [], []
    for cls in sorted(set(simple[1].tolist()) & set(complex_[1].tolist())):
        places = [(y == cls).nonzero().squeeze(1) for _, y in (simple, complex_)]
        size = min(map(len, places))
        above, below = (one[torch.randperm(len(one), generator=draw)[:size]] for one in places)
        pairs.append(torch.cat([simple[0][above], complex_[0][below]], 2))
        labels.append(torch.full((size,), cls))
    if not pairs:
        raise BadData("the images share no class")
    order = torch.randperm(sum(map(len, pairs)), generator=draw)
    return torch.cat(pairs)[order], torch.cat(labels)[order]
