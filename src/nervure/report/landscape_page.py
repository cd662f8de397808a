"""Write a loss landscape as JSON, CSV and one self-contained HTML file."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nervure.core.connectivity import Line
from nervure.core.landscape import Plane
from nervure.report.export import as_json, finite, number, render, write
from nervure.report.plots import landscape_plot


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
    told = {"error": error, "samples": samples, "networks": list(names)}
    data = finite(_values(surface, path) | told | {"command": command, "environment": dict(environment)})
    page = render(
        "landscape.html",
        {
            "title": f"Loss around {name}" if len(names) == 1 else f"Loss between {' and '.join(names)}",
            "plot": landscape_plot(data),
            "told": landscape_told(data),
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


def landscape_told(values: Mapping[str, Any]) -> list[str]:
    """Return what a reader of a landscape must know, in sentences.

    Args:
        values: As the JSON file has them.

    Returns:
        The sentences.
    """
    samples, error = values["samples"], values["error"]
    told = [f"Mean loss of {samples} training samples; its standard error at the network is {error:.2g}."]
    if values["statistics"] == "recomputed":
        told.append("Batch-norm statistics were estimated anew at every point but the networks themselves.")
    else:
        told.append(f"Batch-norm statistics were {values['statistics']}: a barrier may come from them alone.")
    if values["kind"] == "line":
        return [*told, f"The barrier above the chord between the two networks is {number(_known(values['barrier']))}."]
    if values["explained"] is not None:
        told.append(
            f"The plane holds {values['explained']:.0%} of the run's variance around its end. A random walk has a "
            "large share too, so this is no proof that the run is flat."
        )
        off = max(one[2] for one in values["path"])
        told.append(f"The networks lie up to {off:.3g} off the plane; the surface is not theirs.")
    if any(loss is None for row in values["losses"] for loss in row):
        told.append("Points without a finite loss are left white.")
    return told


def _known(value: float | None) -> float:
    """Return a number that JSON may have lacked."""
    return math.nan if value is None else value


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
