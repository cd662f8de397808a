"""Plots of a network: a number of every layer, and the loss on a plane or line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from nervure.report.plots.style import COLOURS, MEDIUM, SMALL, figure, quiet, svg

SHOWN = 40


def layers_plot(layers: Mapping[str, float], unit: str) -> str:
    """Draw a number of every layer as bars, on a logarithmic axis where they differ a hundredfold.

    Args:
        layers: Layer -> number.
        unit: What the numbers are.

    Returns:
        The SVG text.
    """
    shown = dict(list(layers.items())[:SHOWN])
    values = [value if math.isfinite(value) else 0.0 for value in shown.values()]
    drawn = figure(7.2, 0.6 + 0.19 * len(shown))
    ax = drawn.subplots()
    places = range(len(shown))[::-1]
    ax.barh(list(places), values, color=COLOURS[0], height=0.7)
    positive = [value for value in values if value > 0]
    if positive and len(positive) == len(values) and max(positive) > 100 * min(positive):
        ax.set_xscale("log")
    quiet(ax)
    ax.set_yticks(list(places), list(shown), fontsize=SMALL)
    ax.set_xlabel(unit + (f" (the first {SHOWN} layers)" if len(layers) > SHOWN else ""), fontsize=MEDIUM)
    return svg(drawn)


def landscape_plot(values: Mapping[str, Any]) -> str:
    """Draw a landscape.

    Args:
        values: As the JSON file of a landscape has them.

    Returns:
        The SVG text.
    """
    return _line_plot(values) if values["kind"] == "line" else _plane_plot(values)


def _plane_plot(values: Mapping[str, Any]) -> str:
    """Draw the losses of a plane as level lines, and networks as a path on it."""
    losses = np.ma.masked_invalid(np.array(values["losses"], dtype=float))
    path, units = values["path"], values["units"]
    drawn = figure(6.4, 5.2)
    ax = drawn.subplots()
    low = float(losses.min())
    # Above a small loss the levels are even in the logarithm, or one high wall hides all the rest.
    floor = max(1e-3, 0.01 * abs(low))
    shown = np.ma.log10(losses - low + floor)
    levels = MaxNLocator(18).tick_values(float(shown.min()), float(shown.max()))
    filled = ax.contourf(values["x"], values["y"], shown, levels=levels, cmap="viridis")
    ax.contour(values["x"], values["y"], shown, levels=levels, colors="white", linewidths=0.3)
    bar = drawn.colorbar(filled, ax=ax)
    ticks = list(levels[:: max(1, len(levels) // 6)])
    bar.set_ticks(ticks, labels=[f"{10**tick + low - floor:.3g}" for tick in ticks])
    bar.set_label("mean loss", fontsize=MEDIUM)
    bar.ax.tick_params(labelsize=SMALL)
    if path:
        xs, ys = [one[0] for one in path], [one[1] for one in path]
        ax.plot(xs, ys, "-o", color="#ffffff", ms=3, lw=1, mec="#1d2320", mew=0.4)
        ax.annotate("start" if len(path) > 3 else "", (xs[0], ys[0]), color="white", fontsize=SMALL)
        ax.plot(xs[-1:], ys[-1:], "*", color="#ffd166", ms=9, mec="#1d2320", mew=0.4)
    ax.set_xlabel(f"first direction (one step is {units[0]:.3g} in weight space)", fontsize=MEDIUM)
    ax.set_ylabel(f"second direction (one step is {units[1]:.3g})", fontsize=MEDIUM)
    ax.tick_params(labelsize=SMALL)
    return svg(drawn)


def _line_plot(values: Mapping[str, Any]) -> str:
    """Draw the losses on the line through two networks, with the standard error of the loss as a band."""
    shares, losses = np.array(values["shares"]), np.array(values["losses"], dtype=float)
    drawn = figure(7.2, 3.4)
    ax = drawn.subplots()
    ax.plot(shares, losses, "-o", color=COLOURS[0], ms=3, lw=1.4)
    ax.fill_between(
        shares, losses - 1.96 * values["error"], losses + 1.96 * values["error"], color=COLOURS[0], alpha=0.15
    )
    ends = [losses[np.abs(shares - end).argmin()] for end in (0.0, 1.0)]
    ax.plot([0, 1], ends, "--", color="#808080", lw=1)
    for end, name in zip((0, 1), values["networks"], strict=False):
        ax.axvline(end, color="#808080", lw=0.6)
        ax.text(end, ax.get_ylim()[1], f" {name}", fontsize=SMALL, va="top")
    ax.set_xlabel("place on the line", fontsize=MEDIUM)
    ax.set_ylabel("mean loss, 95% interval of the samples", fontsize=MEDIUM)
    quiet(ax)
    return svg(drawn)
