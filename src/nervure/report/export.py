"""Write a verdict or a leaderboard with its raw records as JSON, CSV and one self-contained HTML file."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from nervure._kit import CouldNotRun
from nervure.report import plots
from nervure.report.tables import Board, arm_rows, no_faster
from nervure.spec import Card, Record, Verdict


def number(value: float) -> str:
    """Write a number for people: four significant digits, and all digits of what counts thousands.

    Args:
        value: The number.

    Returns:
        The text.

    Examples:
        >>> number(0.0123456), number(135792.0), number(float("nan"))
        ('0.01235', '135,792', 'n/a')
    """
    if math.isfinite(value) and abs(value) >= 1e4:
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:.4g}" if math.isfinite(value) else "n/a" if math.isnan(value) else str(value)


def render(name: str, values: Mapping[str, Any]) -> str:
    """Return a page: the template filled with values, all text escaped.

    Args:
        name: The template's file.
        values: What it names.

    Returns:
        HTML.
    """
    return templates().get_template(name).render(**values)


@functools.cache
def templates(package: str = "") -> jinja2.Environment:
    """Return the templates: all text is escaped, a name that is not given is an error.

    Args:
        package: A package with templates of its own, which may use the parts of these.

    Returns:
        The environment.
    """
    packages = [*([package] if package else []), "nervure.report"]
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader(one, "templates") for one in packages])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    return environment


def verdict_files(
    verdict: Verdict, card: Card | Mapping[str, Any], records: Sequence[Record], folder: Path, *, command: str
) -> list[Path]:
    """Write a verdict's report.

    Args:
        verdict: The verdict.
        card: The paper's card.
        records: Its records.
        folder: Where to.
        command: The command that repeats it.

    Returns:
        The paths of the JSON, CSV and HTML file.
    """
    values = card.to_json() if isinstance(card, Card) else dict(card)
    page = render(
        "verdict.html",
        {
            "title": f"{values['id']}: {verdict.outcome}",
            "card": values,
            "verdict": verdict,
            **verdict_parts(verdict, records),
            "command": command,
            "environment": environment_of(records),
            "raw": _raw(records),
        },
    )
    data = {"verdict": verdict.to_json(), "card": values, "records": [record.to_json() for record in records]}
    files = {".json": as_json(data), ".csv": table_csv(records), ".html": page}
    return write(folder, verdict.claim_id.replace("/", "."), files)


def verdict_parts(verdict: Verdict, records: Sequence[Record]) -> dict[str, Any]:
    """Return the tables and plots of a verdict's page.

    Args:
        verdict: The verdict.
        records: Its records; without, only the checks are drawn.

    Returns:
        ``rows`` of the arms, and ``plots``: ``checks``, ``arms`` and ``curves``, as SVG text.
    """
    rows = arm_rows(records)
    metrics = dict.fromkeys(result.check.metric for result in verdict.checks) if records else {}
    curves = dict.fromkeys(p.metric for record in records for p in record.measurements if p.step is not None)
    return {
        "rows": rows,
        "plots": {
            "checks": plots.checks_plot(verdict),
            "arms": [plots.arms_plot(rows, metric) for metric in metrics],
            "curves": [plots.curves_plot(records, metric) for metric in curves],
        },
    }


def leaderboard_files(board: Board, folder: Path) -> list[Path]:
    """Write a comparison's report.

    Args:
        board: The comparison.
        folder: Where to.

    Returns:
        The paths of the JSON, CSV and HTML file.
    """
    page = render(
        "leaderboard.html",
        {
            "title": board.title,
            "board": board,
            **board_parts(board),
            "environment": environment_of(board.records),
            "raw": _raw(board.records),
        },
    )
    data = {
        "title": board.title,
        "protocol": board.protocol,
        "tables": [asdict(table) for table in board.tables],
        "records": [record.to_json() for record in board.records],
    }
    return write(folder, board.name, {".json": as_json(data), ".csv": table_csv(board.records), ".html": page})


def board_parts(board: Board) -> dict[str, Any]:
    """Return the plots of a comparison's page.

    Args:
        board: The comparison.

    Returns:
        ``plot``, ``time_plot``, ``cost_plot`` and ``layers`` by case as SVG text, and ``no_faster``: the entrants by
        case that save no time.
    """
    tables, metric = board.tables, board.metric
    smaller = bool(tables and tables[0].unit)
    return {
        "plot": plots.share_plot(tables, metric) if smaller else plots.cases_plot(tables, metric),
        "time_plot": plots.time_plot(tables),
        "cost_plot": plots.cost_plot(tables, metric),
        "layers": {table.case: plots.kept_plot(table, board.layers) if board.layers else "" for table in tables},
        "no_faster": {table.case: no_faster(table) for table in tables},
    }


def environment_of(records: Sequence[Record]) -> dict[str, str]:
    """Return versions and machines of records; several of one kind are joined."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for name, value in record.environment.items():
            found.setdefault(name, {})[value] = None
    return {name: ", ".join(values) for name, values in found.items()}


def _raw(records: Sequence[Record]) -> str:
    return json.dumps([record.to_json() for record in records], indent=1)


def table_csv(records: Sequence[Record]) -> str:
    """Return the records in long form, one number a line.

    Args:
        records: The records.

    Returns:
        CSV text with a header. A cell that a spreadsheet would take for a formula is quoted by an apostrophe.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["job", "target", "case", "seed", "status", "arm", "metric", "step", "value"])
    for record in records:
        job = record.job
        head = [job.id, job.target, job.case, job.seed, str(record.status)]
        for point in record.measurements:
            line = [*head, point.arm, point.metric, point.step if point.step is not None else "", point.value]
            writer.writerow([plain(cell) for cell in line])
        if not record.measurements:
            writer.writerow([plain(cell) for cell in [*head, job.arm, "", "", ""]])
    return text.getvalue()


def finite(value: Any) -> Any:
    """Return JSON-ready values in which a number that JSON lacks is null.

    Args:
        value: Values, lists and dicts of such.

    Returns:
        The same structure.

    Examples:
        >>> finite({"low": float("-inf"), "n": 1})
        {'low': None, 'n': 1}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value


def plain(cell: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")) else cell


def as_json(data: Any) -> str:
    """Return values as JSON text; a number that JSON lacks is null."""
    return json.dumps(finite(data), indent=1, allow_nan=False)


def write(folder: Path, stem: str, files: Mapping[str, str]) -> list[Path]:
    """Write files beside each other, each whole or not at all.

    Args:
        folder: Where to; made if it does not exist.
        stem: Their common name.
        files: Ending -> text.

    Returns:
        The paths.

    Raises:
        CouldNotRun: If the folder cannot be written to.
    """
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for ending, text in files.items():
            path = folder / f"{stem}{ending}"
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
            paths.append(path)
    except OSError as error:
        raise CouldNotRun(
            f"the report cannot be written to {folder}", found=str(error), try_="--report with another folder"
        ) from error
    return paths
