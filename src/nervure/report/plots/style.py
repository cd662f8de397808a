"""Colours, sizes and labels that all plots share."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

# Told apart with any kind of colour vision, and readable on white and on black: at least three to one with both.
COLOURS = ("#0078B4", "#D25A00", "#9600FF", "#875A5A", "#9678FF", "#C3785A", "#A587A5")
MARKERS = "osD^vPX*"
# Becomes the colour of the page's text. A black that must stay black is written as #010101.
_INK = "#000000"
SMALL, MEDIUM = 7, 8


class Label(NamedTuple):
    """Name a line where it ends.

    Args:
        x: Where, in data.
        y: Where, in data.
        text: The name.
        colour: Of the line.
    """

    x: float
    y: float
    text: str
    colour: str


def figure(width: float, height: float) -> Figure:
    """Return an empty figure that lays itself out.

    Args:
        width: Inches.
        height: Inches.

    Returns:
        The figure.
    """
    return Figure(figsize=(width, height), layout="constrained")


def svg(drawn: Figure) -> str:
    """Return a figure as an SVG element, the same text for the same figure; what is black takes the page's ink.

    Args:
        drawn: The figure.

    Returns:
        ``<svg ...>...</svg>``.
    """
    drawn.set_facecolor("none")
    for ax in drawn.axes:
        ax.set_facecolor("none")
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "nervure", "svg.fonttype": "path"}):
        drawn.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    found = re.sub(r"^.*?(?=<svg)", "", text.getvalue(), count=1, flags=re.DOTALL)
    # Text in the default colour carries no colour of its own and takes that of the root.
    return found.replace("<svg ", '<svg fill="currentColor" ', 1).replace(_INK, "currentColor")


def looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return a colour and a marker for each name, the same ones in every plot of the same names.

    Args:
        names: The names.

    Returns:
        Name -> (colour, marker).
    """
    count = len(COLOURS)
    ordered = sorted(set(names))
    return {name: (COLOURS[n % count], MARKERS[(n // count) % len(MARKERS)]) for n, name in enumerate(ordered)}


def quiet(ax: Any, *, sides: Sequence[str] = ("right", "top")) -> None:
    """Take away the frame where it says nothing, and make the numbers small.

    Args:
        ax: The axes.
        sides: Sides without a line.
    """
    ax.tick_params(labelsize=SMALL)
    for side in sides:
        ax.spines[side].set_visible(False)


def span(ax: Any, low: float, high: float, place: float, colour: str) -> None:
    """Draw an interval; nothing where there is none.

    Args:
        ax: The axes.
        low: Its lower end.
        high: Its upper end.
        place: Height it is drawn at.
        colour: Its colour.
    """
    if math.isfinite(low) and math.isfinite(high):
        ax.plot([low, high], [place, place], color=colour, lw=3, solid_capstyle="butt", alpha=0.45)


def reach(mean: float, low: float, high: float) -> tuple[float, float]:
    """Return how far an interval reaches below and above the mean; nothing where there is none.

    Args:
        mean: The mean.
        low: Lower end.
        high: Upper end.

    Returns:
        Two lengths, neither below zero: of equal values the mean may lie beyond the ends by a rounding error.
    """
    ends = (mean - low, high - mean)
    return (max(0.0, ends[0]), max(0.0, ends[1])) if all(map(math.isfinite, ends)) else (0.0, 0.0)


def name_lines(ax: Any, labels: Sequence[Label]) -> None:
    """Write the names of lines beside their ends, moved apart where they would lie on each other.

    Call it last: it reads the limits of the axes.

    Args:
        ax: The axes.
        labels: One a line.
    """
    if not labels:
        return
    height = ax.figure.get_figheight() * 72 * 0.8
    gap = 1.15 * SMALL / height
    ends = []
    for label in labels:
        x, y = ax.transAxes.inverted().transform(ax.transData.transform((label.x, label.y)))
        if math.isfinite(x) and math.isfinite(y):
            ends.append((float(min(max(y, 0.0), 1.0)), float(x), label))
    ends.sort(key=lambda end: end[0])
    places = spread([end[0] for end in ends], gap)
    for place, (y, x, label) in zip(places, ends, strict=True):
        ax.annotate(
            label.text, xy=(x, y), xytext=(1.03, place), xycoords="axes fraction", textcoords="axes fraction",
            fontsize=SMALL, color=label.colour, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": label.colour, "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move sorted places apart until neighbours are a gap apart, keeping their middle.

    Args:
        places: Ascending.
        gap: The least distance.

    Returns:
        The new places.

    Examples:
        >>> [round(place, 2) for place in spread([0.0, 0.5, 0.5], 0.1)]
        [0.0, 0.45, 0.55]
    """
    groups: list[list[float]] = []  # [middle, members]
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            upper, lower = groups.pop(), groups.pop()
            count = upper[1] + lower[1]
            groups.append([(upper[0] * upper[1] + lower[0] * lower[1]) / count, count])
    return [middle + gap * (n - (count - 1) / 2) for middle, count in groups for n in range(int(count))]
