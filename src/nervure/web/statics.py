"""The style sheets and scripts of the pages."""

from __future__ import annotations

from pathlib import Path

from nervure.report.export import templates

FOLDER = Path(__file__).parent / "static"
# vis-graph3d 7.0.3 as its makers release it: standalone/umd/vis-graph3d.min.js.
GRAPH3D = "06931731d5ebe07b99e7e8e4156be77576152f15a861f709b92f6b5717ade984"


def files() -> dict[str, str]:
    """Return what pages load, by name: ours, the reports' style, and vis-graph3d, which draws surfaces.

    Returns:
        Name -> text.
    """
    found = {
        path.name: path.read_text(encoding="utf-8")
        for path in sorted(FOLDER.iterdir())
        if path.suffix in (".css", ".js", ".svg")
    }
    return {**found, "style.css": templates().get_template("style.css").render()}
