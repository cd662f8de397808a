"""Write a loss landscape as JSON, CSV and one self-contained HTML file."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nervure.core.connectivity import Line
from nervure.core.landscape import Plane
from nervure.report.export import as_json, render, write
from nervure.report.plots import svg


def landscape_files(
    surface: Plane | Line,
    folder: Path,
    *,
    name: str,
    path: Sequence[tuple[float, float, float]],
    error: float,
    samples: int,
    names: Sequence[str],
    command: str,
    environment: Mapping[str, str],
) -> list[Path]:
    """Write a landscape's report.

    Args:
        surface: The losses.
        folder: Where to.
        name: What the user calls the network.
        path: Networks on the plane, in order: (x, y, distance).
        error: Standard error of the loss at the network.
        samples: How many samples the loss is of.
        names: The networks' names.
        command: The command that repeats it.
        environment: Versions and machine.

    Returns:
        The paths of the JSON, CSV and HTML file.
    """
    data = _values(surface, path) | {"error": error, "samples": samples, "networks": list(names), "command": command}
    plot = line_plot(surface, names) if isinstance(surface, Line) else plane_plot(surface, path)
    page = render(
        "landscape.html",
        {
            "title": f"Loss around {name}" if len(names) == 1 else f"Loss between {' and '.join(names)}",
            "plot": plot,
            "told": _told(surface, path, error, samples),
            "command": command,
            "environment": dict(environment),
            "raw": as_json(data),
        },
    )
    stem = "landscape-" + re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).name).strip("-.")
    return write(folder, stem, {".json": as_json(data), ".csv": _csv(surface), ".html": page})


def _values(surface: Plane | Line, path: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    if isinstance(surface, Line):
        values = {"shares": surface.shares.tolist(), "losses": surface.losses.tolist(), "barrier": surface.barrier}
        return {"kind": "line", **values, "statistics": surface.statistics}
    return {
        "kind": "plane",
        "x": surface.xs.tolist(),
        "y": surface.ys.tolist(),
        "losses": surface.losses.tolist(),
        "path": [list(one) for one in path],
        "units": list(surface.units),
        "statistics": surface.statistics,
        "explained": surface.explained,
    }


def _told(surface: Plane | Line, path: Sequence[Any], error: float, samples: int) -> list[str]:
    """Return what a reader must know, in sentences."""
    told = [f"Mean loss of {samples} training samples; its standard error at the network is {error:.2g}."]
    if surface.statistics == "recomputed":
        told.append("Batch-norm statistics were estimated anew at every point but the networks themselves.")
    else:
        told.append(f"Batch-norm statistics were {surface.statistics}: a barrier may come from them alone.")
    if isinstance(surface, Line):
        told.append(f"The barrier above the chord between the two networks is {surface.barrier:.4g}.")
        return told
    if surface.explained is not None:
        told.append(
            f"The plane holds {surface.explained:.0%} of the run's variance around its end. A random walk has a large "
            "share too, so this is no proof that the run is flat."
        )
        told.append(
            f"The networks lie up to {max(one[2] for one in path):.3g} off the plane; the surface is not theirs."
        )
    if math.isnan(float(surface.losses.sum())) or math.isinf(float(surface.losses.sum())):
        told.append("Points without a finite loss are left white.")
    return told


def plane_plot(surface: Plane, path: Sequence[tuple[float, float, float]]) -> str:
    """Draw the losses of a plane as level lines, and networks as a path on it.

    Args:
        surface: The losses.
        path: Networks in order: (x, y, distance).

    Returns:
        The SVG text.
    """
    losses = np.ma.masked_invalid(surface.losses.numpy())
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    ax = figure.subplots()
    low = float(losses.min())
    # Above a small loss the levels are even in the logarithm, or one high wall hides all the rest.
    floor = max(1e-3, 0.01 * abs(low))
    shown = np.ma.log10(losses - low + floor)
    levels = MaxNLocator(18).tick_values(float(shown.min()), float(shown.max()))
    filled = ax.contourf(surface.xs.numpy(), surface.ys.numpy(), shown, levels=levels, cmap="viridis")
    ax.contour(surface.xs.numpy(), surface.ys.numpy(), shown, levels=levels, colors="white", linewidths=0.3)
    bar = figure.colorbar(filled, ax=ax)
    ticks = list(levels[:: max(1, len(levels) // 6)])
    bar.set_ticks(ticks, labels=[f"{10**tick + low - floor:.3g}" for tick in ticks])
    bar.set_label("mean loss", fontsize=8)
    if path:
        xs, ys = [one[0] for one in path], [one[1] for one in path]
        ax.plot(xs, ys, "-o", color="#ffffff", ms=3, lw=1, mec="#1d2320", mew=0.4)
        ax.annotate("start" if len(path) > 3 else "", (xs[0], ys[0]), color="white", fontsize=7)
        ax.plot(xs[-1:], ys[-1:], "*", color="#ffd166", ms=9, mec="#1d2320", mew=0.4)
    ax.set_xlabel(f"first direction (one step is {surface.units[0]:.3g} in weight space)", fontsize=8)
    ax.set_ylabel(f"second direction (one step is {surface.units[1]:.3g})", fontsize=8)
    ax.tick_params(labelsize=7)
    return svg(figure)


def line_plot(surface: Line, names: Sequence[str]) -> str:
    """Draw the losses on the line through two networks.

    Args:
        surface: The losses.
        names: The networks' names.

    Returns:
        The SVG text.
    """
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    ax = figure.subplots()
    ax.plot(surface.shares, surface.losses, "-o", color="#2f6f4f", ms=3, lw=1.4)
    ends = [float(surface.losses[int((surface.shares - end).abs().argmin())]) for end in (0.0, 1.0)]
    ax.plot([0, 1], ends, "--", color="#999999", lw=1)
    for end, name in zip((0, 1), names, strict=False):
        ax.axvline(end, color="#999999", lw=0.6)
        ax.text(end, ax.get_ylim()[1], f" {name}", fontsize=7, va="top")
    ax.set_xlabel("place on the line", fontsize=8)
    ax.set_ylabel("mean loss", fontsize=8)
    ax.tick_params(labelsize=7)
    return svg(figure)


def _csv(surface: Plane | Line) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if isinstance(surface, Line):
        writer.writerow(["share", "loss"])
        writer.writerows(zip(surface.shares.tolist(), surface.losses.tolist(), strict=True))
        return text.getvalue()
    writer.writerow(["x", "y", "loss"])
    for y, row in zip(surface.ys.tolist(), surface.losses.tolist(), strict=True):
        writer.writerows([x, y, loss] for x, loss in zip(surface.xs.tolist(), row, strict=True))
    return text.getvalue()
