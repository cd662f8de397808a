"""Write an audit as JSON, CSV and one self-contained HTML file."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path

from nervure.audit import Audit
from nervure.report.export import as_json, plain, render, write
from nervure.report.plots import layers_plot


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
            "plots": layer_plots(audit),
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


def layer_plots(audit: Audit) -> dict[str, str]:
    """Return a plot of every check that looked at more than one layer.

    Args:
        audit: The findings.

    Returns:
        Check -> SVG text.
    """
    return {one.check: layers_plot(one.layers, one.unit) for one in audit.findings if len(one.layers) > 1}


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
