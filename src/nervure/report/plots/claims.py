"""Plots of a claim: its checks, its arms, its curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nervure.report.plots.style import COLOURS, MEDIUM, Label, figure, looks, name_lines, quiet, span, svg
from nervure.report.tables import ArmRow, interval
from nervure.spec import Record, Verdict


def checks_plot(verdict: Verdict) -> str:
    """Draw each check's interval and seeds beside the dashed line of what is asked.

    Args:
        verdict: The verdict.

    Returns:
        The SVG text.
    """
    shown = [result for result in verdict.checks if result.n]
    drawn = figure(7.2, 0.3 + 0.75 * max(1, len(shown)))
    axes = drawn.subplots(len(shown) or 1, 1, squeeze=False)[:, 0]
    for ax, result in zip(axes, shown, strict=False):
        reading = result.reading
        ax.axvline(reading.bound, color="#808080", lw=1, ls="--")
        span(ax, reading.low, reading.high, 0, COLOURS[0])
        ax.plot(reading.seeds, [0] * len(reading.seeds), "|", color=COLOURS[1], ms=9)
        ax.plot([reading.mean], [0], "o", color=COLOURS[0], ms=6)
        ax.set_yticks([])
        title = f"{result.check.name} ({result.check.metric}, {reading.asked}): {result.outcome}"
        ax.set_title(title, fontsize=MEDIUM, loc="left")
        quiet(ax, sides=("left", "right", "top"))
    if not shown:
        axes[0].set_axis_off()
    return svg(drawn)


def arms_plot(rows: Sequence[ArmRow], metric: str) -> str:
    """Draw every arm's values by seed, their mean and its 95% interval.

    Args:
        rows: Rows of any metrics.
        metric: The metric to draw.

    Returns:
        The SVG text.
    """
    shown = [row for row in rows if row.metric == metric and row.n]
    colours = looks([row.arm for row in shown])
    drawn = figure(7.2, 0.6 + 0.34 * max(1, len(shown)))
    ax = drawn.subplots()
    for place, row in enumerate(reversed(shown)):
        colour, marker = colours[row.arm]
        finite = [value for value in row.values.values() if math.isfinite(value)]
        ax.plot(finite, [place] * len(finite), "|", color=colour, ms=9)
        span(ax, row.low, row.high, place, colour)
        ax.plot([row.mean], [place], marker, color=colour, ms=6)
    quiet(ax)
    ax.set_yticks(range(len(shown)), [row.arm for row in reversed(shown)], fontsize=MEDIUM)
    ax.set_xlabel(f"{metric}: mean, 95% interval, one bar a seed", fontsize=MEDIUM)
    return svg(drawn)


def curves_plot(records: Sequence[Record], metric: str) -> str:
    """Draw a metric's mean over seeds along its steps, one line an arm with the 95% band.

    Args:
        records: The records.
        metric: A metric measured at steps.

    Returns:
        The SVG text.
    """
    curves: dict[str, dict[float, list[float]]] = {}
    for record in records:
        for point in record.measurements:
            if point.metric == metric and point.step is not None and math.isfinite(point.value):
                curves.setdefault(point.arm, {}).setdefault(point.step, []).append(point.value)
    drawn = figure(7.2, 3.2)
    ax = drawn.subplots()
    colours, labels = looks(list(curves)), []
    densities = bool(curves) and all(0 < step <= 1 for points in curves.values() for step in points)
    for arm, points in curves.items():
        steps = sorted(points, reverse=densities)
        means, lows, highs = zip(*(interval(points[step]) for step in steps), strict=True)
        colour, marker = colours[arm]
        alone = marker if len(steps) == 1 else ""
        ax.plot(steps, means, color=colour, lw=1.4, marker=alone)
        ax.fill_between(steps, lows, highs, color=colour, alpha=0.15, lw=0)
        labels.append(Label(steps[-1], means[-1], arm, colour))
    if densities:
        ax.set_xscale("log")
        ax.invert_xaxis()
    ax.set_xlabel("density (share of weights that are not zero)" if densities else "step", fontsize=MEDIUM)
    ax.set_ylabel(f"{metric}, mean and 95% interval", fontsize=MEDIUM)
    quiet(ax)
    name_lines(ax, labels)
    return svg(drawn)
