"""The style sheets and scripts of the pages."""

from __future__ import annotations

from pathlib import Path

from nervure.report.export import templates

FOLDER = Path(__file__).parent / "static"


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
