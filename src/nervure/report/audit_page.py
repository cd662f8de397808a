"""Write an audit as JSON, CSV and one self-contained HTML file."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from nervure.audit import Audit, Finding
from nervure.report.export import as_json, plain, render, write
from nervure.report.plots import svg

SHOWN = 40


def audit_files(audit: Audit, folder: Path, *, command: str, environment: Mapping[str, str]) -> list[Path]:
    """Write an audit's report.

    Args:
        audit: The findings.
        folder: Where to.
        command: The command that repeats it.
        environment: Versions and machine.

    Returns:
        The paths of the JSON, CSV and HTML file.
    """
    page = render(
        "audit.html",
        {
            "title": f"Audit of {audit.model}",
            "audit": audit,
            "counts": counts(audit),
            "plots": {finding.check: layers_plot(finding) for finding in audit.findings if len(finding.layers) > 1},
            "command": command,
            "environment": dict(environment),
            "raw": as_json(audit.to_json()),
        },
    )
    data = {**audit.to_json(), "command": command, "environment": dict(environment)}
    stem = "audit-" + re.sub(r"[^A-Za-z0-9._-]+", "-", Path(audit.model).name).strip("-.")
    return write(folder, stem, {".json": as_json(data), ".csv": _csv(audit), ".html": page})


def counts(audit: Audit) -> dict[str, int]:
    """Return how many findings there are of each level, worst first, levels without any left out."""
    order = ("problem", "warning", "note", "ok", "cannot tell")
    found = {level: sum(one.level == level for one in audit.findings) for level in order}
    return {level: count for level, count in found.items() if count}


def layers_plot(finding: Finding) -> str:
    """Draw a finding's number of every layer as bars, on a logarithmic axis where they differ a hundredfold.

    Args:
        finding: With numbers by layer.

    Returns:
        The SVG text.
    """
    shown = dict(list(finding.layers.items())[:SHOWN])
    values = [value if math.isfinite(value) else 0.0 for value in shown.values()]
    figure = Figure(figsize=(7.2, 0.6 + 0.19 * len(shown)))
    ax = figure.subplots()
    places = range(len(shown))[::-1]
    ax.barh(list(places), values, color="#2f6f4f", height=0.7)
    ax.set_yticks(list(places), list(shown), fontsize=6)
    positive = [value for value in values if value > 0]
    if positive and len(positive) == len(values) and max(positive) > 100 * min(positive):
        ax.set_xscale("log")
    ax.set_xlabel(finding.unit + (f" (the first {SHOWN} layers)" if len(finding.layers) > SHOWN else ""), fontsize=8)
    ax.tick_params(axis="x", labelsize=7)
    for side in ("right", "top"):
        ax.spines[side].set_visible(False)
    figure.tight_layout()
    return svg(figure)


def _csv(audit: Audit) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["check", "level", "layer", "name", "value"])
    for finding in audit.findings:
        rows: list[tuple[str, str, object]] = [("", name, value) for name, value in finding.values.items()]
        rows += [(layer, finding.unit, value) for layer, value in finding.layers.items()]
        for row in rows or [("", "", "")]:
            writer.writerow([plain(cell) for cell in (finding.check, finding.level, *row)])
    return text.getvalue()
