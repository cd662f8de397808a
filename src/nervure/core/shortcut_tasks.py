"""Small tasks with a simple feature that tempts and another that holds: folded moons, images in two colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nervure._kit import BadData, UsageError
from nervure.core import rng


def moon(count: int, *, gap: float, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw two half moons folded onto the two sides of the second axis, so that a straight line parts them.

    Args:
        count: Number of points.
        gap: How far each moon lies from the axis; negative ones overlap.
        noise: Standard deviation around the half circles.
        seed: Draws the points.

    Returns:
        Points, shape (N, 2), the parted coordinate first; classes 0 and 1.
    """
    from sklearn.datasets import make_moons

    plane, label = make_moons(n_samples=count, noise=noise, random_state=seed % 2**32)
    points, y = torch.from_numpy(plane), torch.from_numpy(label).long()
    sign = 2.0 * y - 1
    height = points[:, 1] - 0.3 * sign
    height = height - height.mean()
    return torch.stack([-sign * (height.abs() + gap), points[:, 0] - 0.5], 1).float(), y


@dataclass(frozen=True)
class Coloured:
    """Hold two-colour images from one or more environments.

    Args:
        x: Images in one of two channels, shape (N, 2, H, W).
        y: Classes 0 and 1 after label noise, shape (N,).
        colour: The channel of each image, shape (N,).
        shape: Classes before label noise, shape (N,).
        environment: The environment of each image, shape (N,).
    """

    x: Tensor
    y: Tensor
    colour: Tensor
    shape: Tensor
    environment: Tensor


def two_colours(
    images: Tensor, labels: Tensor, *, agreement: Sequence[float] = (0.9, 0.8), noise: float = 0.25, seed: int = 0
) -> Coloured:
    """Colour grey images so that the colour tells the label better than the shape does.

    The label is `labels` flipped with the chance `noise`; the colour is that label with the chance of the environment's
    agreement. The best guess by shape is right in 1 - noise of all cases, that by colour in the share of the agreement.

    Args:
        images: Grey images, shape (N, 1, H, W); their least value becomes 0, the largest 1.
        labels: Classes 0 and 1, shape (N,).
        agreement: For each environment how often colour and label agree; the images are dealt out evenly.
        noise: How often the label is not that of the shape.
        seed: Draws who comes where, the flips and the colours.

    Returns:
        The images.

    Raises:
        BadData: If images are not grey or labels not 0 and 1.
        UsageError: If a chance is outside [0, 1].

    Examples:
        >>> made = two_colours(torch.rand(100, 1, 8, 8), torch.arange(100) % 2, agreement=(1.0,), noise=0.0)
        >>> made.x.shape, torch.equal(made.colour, made.shape)
        (torch.Size([100, 2, 8, 8]), True)
    """
    if images.ndim != 4 or images.shape[1] != 1 or not bool(((labels == 0) | (labels == 1)).all()):
        raise BadData("these images cannot be coloured", expected="(N, 1, H, W) and labels 0 and 1",
                      found=f"{tuple(images.shape)} and {labels.unique().tolist()[:5]}")  # fmt: skip
    if not agreement or not all(0 <= chance <= 1 for chance in (noise, *agreement)):
        raise UsageError("there is no such colouring", expected="chances", found=f"{list(agreement)}, {noise}")
    draw, count = rng.generator("two-colours", seed), len(images)
    place = torch.randperm(count, generator=draw)
    environment = (torch.arange(count) * len(agreement) // count)[place.argsort()]
    y = torch.where(torch.rand(count, generator=draw) < noise, 1 - labels, labels)
    agrees = torch.rand(count, generator=draw) < torch.tensor(list(agreement))[environment]
    colour = torch.where(agrees, y, 1 - y)
    low, high = images.min(), images.max()
    grey = (images - low) / torch.where(high > low, high - low, 1.0)
    x = grey * torch.nn.functional.one_hot(colour, 2).to(grey.dtype)[:, :, None, None]
    return Coloured(x, y, colour, labels.clone(), environment)
