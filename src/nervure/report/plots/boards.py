"""Plots of a comparison: the metric by share or case, what it costs, and what is left of each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nervure.report.plots.style import MEDIUM, SMALL, Label, figure, looks, name_lines, quiet, reach, span, svg
from nervure.report.tables import CaseTable

_SHARES = {
    "density": "density (share of weights that are not zero)",
    "macs": "share of the multiply-adds",
    "params": "share of the parameters",
    "bytes": "share of the bytes on disk",
}
_COSTS = {
    "ms_64": "measured ms, batch 64",
    "nonzero_macs": "multiply-adds of one sample whose weight is not zero",
}


def share_plot(tables: Sequence[CaseTable], metric: str) -> str:
    """Draw the metric against the share that stays with 95% intervals; what keeps everything is a level.

    Args:
        tables: One leaderboard a share.
        metric: The metric's name.

    Returns:
        The SVG text.
    """
    drawn = figure(7.2, 4.0)
    ax = drawn.subplots()
    levels = {arm for table in tables for arm in table.levels}
    labels = []
    for arm, (colour, marker) in _looks(tables).items():
        points = sorted(((table.share, *table.spread[arm]) for table in tables if arm in table.spread), reverse=True)
        if not points:
            continue
        x, mean = [point[0] for point in points], [point[1] for point in points]
        if arm in levels:
            ax.axhline(mean[0], color=colour, lw=1, ls="--")
            ax.axhspan(mean[0] - reach(*points[0][1:])[0], mean[0] + reach(*points[0][1:])[1], color=colour, alpha=0.1)
        else:
            gap = list(zip(*(reach(*point[1:]) for point in points), strict=True))
            ax.errorbar(x, mean, yerr=gap, color=colour, lw=1.4, marker=marker, ms=4, capsize=2)
        labels.append(Label(min(table.share for table in tables), mean[-1], arm, colour))
    _bound_shares(ax, [mean for table in tables for mean, _, _ in table.spread.values()])
    shares = [table.share for table in tables]
    if shares:
        ax.set_xscale("log")
        ax.set_xticks(shares, [_percent(share) for share in shares])
        ax.minorticks_off()
        ax.invert_xaxis()
    ax.set_xlabel(_SHARES[tables[0].unit] if tables else "share", fontsize=MEDIUM)
    ax.set_ylabel(f"{metric}, mean and 95% interval", fontsize=MEDIUM)
    quiet(ax)
    name_lines(ax, labels)
    return svg(drawn)


def cases_plot(tables: Sequence[CaseTable], metric: str) -> str:
    """Draw the metric of every arm with its 95% interval, a panel a case.

    Args:
        tables: One leaderboard a case.
        metric: The metric's name.

    Returns:
        The SVG text.
    """
    colours, columns = _looks(tables), min(3, max(1, len(tables)))
    rows = max(1, math.ceil(len(tables) / columns))
    most = max((len(table.spread) for table in tables), default=1)
    drawn = figure(3.2 * columns + 1.2, rows * (0.9 + 0.22 * most))
    panels = drawn.subplots(rows, columns, squeeze=False).flatten()
    for ax, table in zip(panels, tables, strict=False):
        arms = [row.arm for row in table.rows if row.arm in table.spread]
        for place, arm in enumerate(reversed(arms)):
            mean, low, high = table.spread[arm]
            colour, marker = colours[arm]
            span(ax, low, high, place, colour)
            ax.plot([mean], [place], marker, color=colour, ms=5)
        means = [table.spread[arm][0] for arm in arms]
        if means and min(means) > 0 and max(means) > 100 * min(means):
            ax.set_xscale("log")
        quiet(ax)
        ax.set_yticks(range(len(arms)), list(reversed(arms)), fontsize=SMALL)
        ax.set_title(table.case, fontsize=SMALL, loc="left")
        ax.set_xlabel(f"{metric}, 95% interval", fontsize=SMALL)
    for ax in panels[len(tables) :]:
        ax.set_visible(False)
    return svg(drawn)


def time_plot(tables: Sequence[CaseTable]) -> str:
    """Draw the measured milliseconds at batch 64 against the multiply-adds whose weight is not zero.

    An arm whose points lie level has fewer multiply-adds on paper and saves no time.

    Args:
        tables: One leaderboard a share.

    Returns:
        The SVG text; empty where nothing was timed.
    """
    return _against(tables, x="nonzero_macs", y="ms_64", x_text=_COSTS["nonzero_macs"], y_text=_COSTS["ms_64"])


def cost_plot(tables: Sequence[CaseTable], metric: str) -> str:
    """Draw the metric against the measured milliseconds, with both intervals: up and to the left is better.

    Args:
        tables: One leaderboard a share.
        metric: The metric's name.

    Returns:
        The SVG text; empty where nothing was timed.
    """
    return _against(tables, x="ms_64", y=metric, x_text=_COSTS["ms_64"], y_text=metric)


def _against(tables: Sequence[CaseTable], *, x: str, y: str, x_text: str, y_text: str) -> str:
    points: dict[str, list[tuple[tuple[float, float, float], ...]]] = {}
    for table in tables:
        for arm, found in table.means.items():
            if {x, y} <= found.keys() and math.isfinite(found[x]) and math.isfinite(found[y]):
                ends = table.ends.get(arm, {})
                here = tuple((found[name], *ends.get(name, (math.nan, math.nan))) for name in (x, y))
                if here not in points.setdefault(arm, []):
                    points[arm].append(here)
    if not points:
        return ""
    drawn = figure(7.2, 4.0)
    ax = drawn.subplots()
    labels = []
    for arm, (colour, marker) in _looks(tables).items():
        along = sorted(points.get(arm, []))
        if not along:
            continue
        places = [[one[axis][0] for one in along] for axis in (0, 1)]
        gaps = [list(zip(*(reach(*one[axis]) for one in along), strict=True)) for axis in (0, 1)]
        line = "-" if len(along) > 1 else "none"
        ax.errorbar(
            places[0], places[1], xerr=gaps[0], yerr=gaps[1], color=colour, lw=1, ls=line, marker=marker, ms=4,
            elinewidth=0.8, capsize=2,
        )  # fmt: skip
        labels.append(Label(places[0][-1], places[1][-1], arm, colour))
    if x == "nonzero_macs":
        ax.set_xscale("log")
        ax.set_ylim(bottom=0)
    ax.set_xlabel(f"{x_text}, 95% interval", fontsize=MEDIUM)
    ax.set_ylabel(f"{y_text}, 95% interval", fontsize=MEDIUM)
    quiet(ax)
    name_lines(ax, labels)
    return svg(drawn)


def kept_plot(table: CaseTable, prefix: str) -> str:
    """Draw for every arm and layer which share of the layer's entries is left, so that an emptied layer is seen.

    Args:
        table: A leaderboard.
        prefix: What the metrics of single layers begin with.

    Returns:
        The SVG text; empty where no layers were measured.
    """
    arms = [arm for arm, found in table.means.items() if any(name.startswith(prefix) for name in found)]
    layers = list(dict.fromkeys(name for arm in arms for name in table.means[arm] if name.startswith(prefix)))
    if not layers:
        return ""
    shares = [[table.means[arm].get(layer, math.nan) for layer in layers] for arm in arms]
    drawn = figure(max(4.0, 1.6 + 0.42 * len(layers)), 1.1 + 0.24 * len(arms))
    ax = drawn.subplots()
    ax.imshow(shares, cmap="YlGn", vmin=0, vmax=1, aspect="auto")
    for row, values in enumerate(shares):
        for column, value in enumerate(values):
            if math.isfinite(value):
                ink = "white" if value > 0.6 else "#010101"
                ax.text(column, row, _percent(value), ha="center", va="center", fontsize=6, color=ink)
    names = [layer.removeprefix(prefix).removesuffix(".weight") for layer in layers]
    ax.set_xticks(range(len(layers)), names, rotation=60, ha="right", fontsize=SMALL)
    ax.set_yticks(range(len(arms)), arms, fontsize=SMALL)
    return svg(drawn)


def _looks(tables: Sequence[CaseTable]) -> dict[str, tuple[str, str]]:
    return looks([arm for table in tables for arm in table.means])


def _bound_shares(ax: Any, means: Sequence[float]) -> None:
    """Keep the axis of a share between 0 and 1: intervals of few seeds reach beyond what it can be."""
    if means and min(means) >= 0 and max(means) <= 1:
        low, high = ax.get_ylim()
        ax.set_ylim(max(0.0, low), min(1.01, high))


def _percent(share: float) -> str:
    """Write a share so that an emptied layer and one that is nearly empty read differently."""
    return "0" if share == 0 else f"{share:.2%}" if share < 0.001 else f"{share:.1%}" if share < 0.1 else f"{share:.0%}"
