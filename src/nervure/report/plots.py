"""Plots as SVG text, drawn without pyplot."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from nervure.report.tables import ArmRow, CaseTable, interval
from nervure.spec import Record, Verdict

_COLOURS = ("#2f6f4f", "#b3541e", "#3b5b92", "#8a3b72", "#6b6b2a", "#2a7f86", "#7a4b2a", "#555555")


def svg(figure: Figure) -> str:
    """Return a figure as an SVG element, the same text for the same figure.

    Args:
        figure: The figure.

    Returns:
        ``<svg ...>...</svg>``.
    """
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "nervure", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), count=1, flags=re.DOTALL)


def checks_plot(verdict: Verdict) -> str:
    """Draw each check's interval beside the dashed line of what is asked.

    Args:
        verdict: The verdict.

    Returns:
        The SVG text.
    """
    shown = [result for result in verdict.checks if result.n]
    figure = Figure(figsize=(7.2, 0.6 + 0.62 * max(1, len(shown))))
    axes = figure.subplots(len(shown) or 1, 1, squeeze=False)[:, 0]
    for ax, result in zip(axes, shown, strict=False):
        reading = result.reading
        ax.axvline(reading.bound, color="#999999", lw=1, ls="--")
        if math.isfinite(reading.low) and math.isfinite(reading.high):
            ax.plot([reading.low, reading.high], [0, 0], color=_COLOURS[0], lw=3, solid_capstyle="butt", alpha=0.5)
        ax.plot(reading.seeds, [0] * len(reading.seeds), "|", color=_COLOURS[2], ms=9)
        ax.plot([reading.mean], [0], "o", color=_COLOURS[0], ms=6)
        ax.set_yticks([])
        ax.set_title(f"{result.check.name} ({reading.asked}): {result.outcome}", fontsize=8, loc="left")
        ax.tick_params(labelsize=7)
        for side in ("left", "right", "top"):
            ax.spines[side].set_visible(False)
    figure.tight_layout()
    return svg(figure)


def arms_plot(rows: Sequence[ArmRow], metric: str) -> str:
    """Draw every arm's values by seed and the interval of their mean.

    Args:
        rows: Rows of any metrics.
        metric: The metric to draw.

    Returns:
        The SVG text.
    """
    shown = [row for row in rows if row.metric == metric and row.n]
    figure = Figure(figsize=(7.2, 0.7 + 0.34 * max(1, len(shown))))
    ax = figure.subplots()
    for place, row in enumerate(reversed(shown)):
        colour = _COLOURS[(len(shown) - 1 - place) % len(_COLOURS)]  # as in the curves, where the first is on top
        finite = [value for value in row.values.values() if math.isfinite(value)]
        ax.plot(finite, [place] * len(finite), "|", color=colour, ms=9)
        if math.isfinite(row.low):
            ax.plot([row.low, row.high], [place, place], color=colour, lw=3, alpha=0.4, solid_capstyle="butt")
        ax.plot([row.mean], [place], "o", color=colour, ms=6)
    ax.set_yticks(range(len(shown)), [row.arm for row in reversed(shown)], fontsize=8)
    ax.set_xlabel(metric, fontsize=8)
    ax.tick_params(axis="x", labelsize=7)
    figure.tight_layout()
    return svg(figure)


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
    figure = Figure(figsize=(7.2, 3.2))
    ax = figure.subplots()
    for index, (arm, points) in enumerate(curves.items()):
        steps = sorted(points)
        spread = [interval(points[step]) for step in steps]
        colour = _COLOURS[index % len(_COLOURS)]
        ax.plot(steps, [mean for mean, _, _ in spread], color=colour, lw=1.4, label=arm)
        ax.fill_between(steps, [low for _, low, _ in spread], [high for _, _, high in spread], color=colour, alpha=0.15)
    if all(0 < step <= 1 for points in curves.values() for step in points):
        ax.set_xscale("log")
        ax.invert_xaxis()
        ax.set_xlabel("density", fontsize=8)
    else:
        ax.set_xlabel("step", fontsize=8)
    ax.set_ylabel(metric, fontsize=8)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return svg(figure)


_SHARES = {
    "density": "density (share of weights that are not zero)",
    "macs": "share of the multiply-adds",
    "params": "share of the parameters",
    "bytes": "share of the bytes on disk",
}


def share_plot(tables: Sequence[CaseTable], metric: str) -> str:
    """Draw the metric against the share that stays with 95% intervals; what keeps everything is a level.

    Args:
        tables: One leaderboard a share.
        metric: The metric's name.

    Returns:
        The SVG text.
    """
    figure = Figure(figsize=(7.2, 4.0))
    ax = figure.subplots()
    levels = {arm for table in tables for arm in table.levels}
    for arm, (colour, marker) in _looks(tables).items():
        points = [(table.share, *table.spread[arm]) for table in tables if arm in table.spread]
        if not points:
            continue
        x, mean = [point[0] for point in points], [point[1] for point in points]
        if arm in levels:
            ax.axhline(mean[0], color=colour, lw=1, ls="--", label=arm)
            continue
        gap = [
            # Of equal values the mean may lie beyond the interval's ends by a rounding error.
            [max(0.0, m - low) if math.isfinite(low) else 0.0 for _, m, low, _ in points],
            [max(0.0, high - m) if math.isfinite(high) else 0.0 for _, m, _, high in points],
        ]
        ax.errorbar(x, mean, yerr=gap, color=colour, lw=1.4, marker=marker, ms=4, capsize=2, label=arm)
    means = [mean for table in tables for mean, _, _ in table.spread.values()]
    if means and min(means) >= 0 and max(means) <= 1:  # a share: intervals of few seeds reach beyond what it can be
        low, high = ax.get_ylim()
        ax.set_ylim(max(0.0, low), min(1.01, high))
    ax.set_xscale("log")
    ax.invert_xaxis()
    shares = [table.share for table in tables]
    ax.set_xticks(shares, [_percent(share) for share in shares])
    ax.minorticks_off()
    ax.set_xlabel(_SHARES[tables[0].unit] if tables else "share", fontsize=8)
    ax.set_ylabel(metric, fontsize=8)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=7, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return svg(figure)


def cases_plot(tables: Sequence[CaseTable], metric: str) -> str:
    """Draw the metric of every arm with its 95% interval, a panel a case.

    Args:
        tables: One leaderboard a case.
        metric: The metric's name.

    Returns:
        The SVG text.
    """
    looks, columns = _looks(tables), min(3, max(1, len(tables)))
    rows = max(1, math.ceil(len(tables) / columns))
    most = max((len(table.spread) for table in tables), default=1)
    figure = Figure(figsize=(3.2 * columns + 1.2, rows * (0.9 + 0.22 * most)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, table in zip(panels, tables, strict=False):
        arms = [row.arm for row in table.rows if row.arm in table.spread]
        for place, arm in enumerate(reversed(arms)):
            mean, low, high = table.spread[arm]
            colour, marker = looks[arm]
            if math.isfinite(low):
                ax.plot([low, high], [place, place], color=colour, lw=3, alpha=0.4, solid_capstyle="butt")
            ax.plot([mean], [place], marker, color=colour, ms=5)
        ax.set_yticks(range(len(arms)), list(reversed(arms)), fontsize=6)
        means = [table.spread[arm][0] for arm in arms]
        if means and min(means) > 0 and max(means) > 100 * min(means):
            ax.set_xscale("log")
        ax.set_title(table.case, fontsize=7, loc="left")
        ax.set_xlabel(metric, fontsize=6)
        ax.tick_params(axis="x", labelsize=6)
    for ax in panels[len(tables) :]:
        ax.set_visible(False)
    return svg(figure)


_MARKERS = "osD^vPX*"


def _looks(tables: Sequence[CaseTable]) -> dict[str, tuple[str, str]]:
    """Return a colour and a marker for each arm, the same ones in every plot."""
    arms = sorted({arm for table in tables for arm in table.means})
    count = len(_COLOURS)
    return {arm: (_COLOURS[n % count], _MARKERS[(n // count) % len(_MARKERS)]) for n, arm in enumerate(arms)}


def time_plot(tables: Sequence[CaseTable]) -> str:
    """Draw the measured milliseconds at batch 64 against the multiply-adds whose weight is not zero.

    An arm whose points lie level has fewer multiply-adds on paper and saves no time.

    Args:
        tables: One leaderboard a share.

    Returns:
        The SVG text.
    """
    figure = Figure(figsize=(7.2, 4.0))
    ax = figure.subplots()
    for arm, (colour, marker) in _looks(tables).items():
        both = [table.means[arm] for table in tables if {"nonzero_macs", "ms_64"} <= table.means.get(arm, {}).keys()]
        points = sorted({(found["nonzero_macs"], found["ms_64"]) for found in both})
        x, y = [macs for macs, _ in points], [took for _, took in points]
        ax.plot(x, y, color=colour, lw=1, marker=marker, ms=4, label=arm, ls="-" if len(points) > 1 else "none")
    ax.set_xscale("log")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("multiply-adds of one sample whose weight is not zero", fontsize=8)
    ax.set_ylabel("measured ms, batch 64", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=7, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return svg(figure)


def layers_plot(table: CaseTable, prefix: str) -> str:
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
    figure = Figure(figsize=(max(4.0, 1.6 + 0.42 * len(layers)), 1.1 + 0.24 * len(arms)))
    ax = figure.subplots()
    ax.imshow(shares, cmap="YlGn", vmin=0, vmax=1, aspect="auto")
    for row, values in enumerate(shares):
        for column, value in enumerate(values):
            if math.isfinite(value):
                ink = "white" if value > 0.6 else "black"
                ax.text(column, row, _percent(value), ha="center", va="center", fontsize=6, color=ink)
    names = [layer.removeprefix(prefix).removesuffix(".weight") for layer in layers]
    ax.set_xticks(range(len(layers)), names, rotation=60, ha="right", fontsize=7)
    ax.set_yticks(range(len(arms)), arms, fontsize=7)
    return svg(figure)


def _percent(share: float) -> str:
    """Write a share so that an emptied layer and one that is nearly empty read differently."""
    return "0" if share == 0 else f"{share:.2%}" if share < 0.001 else f"{share:.1%}" if share < 0.1 else f"{share:.0%}"
