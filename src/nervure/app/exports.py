"""Write a verdict or leaderboard again from the stored records."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from nervure._kit import UnknownId, UsageError
from nervure.app.library import Library, Run, repeat
from nervure.arena import find_claim, prune
from nervure.arena.contest import CONTESTS
from nervure.report import leaderboard_files, verdict_files
from nervure.store import Store


def export(what: str, *, store: str | Path | None = None, folder: str | Path = "reports") -> list[Path]:
    """Write JSON, CSV and HTML of what the store has.

    Where the store holds several settings of one claim or comparison (a rehearsal, another data set, other steps),
    the one measured last is written.

    Args:
        what: A claim (``card`` or ``card/claim``), ``compare-prune``, or ``compare-`` and a contest's name.
        store: The store; None for the user's own.
        folder: Where to.

    Returns:
        The paths.

    Raises:
        UsageError: If the store has no record of it.
    """
    with Store.open(store) as opened:
        library = Library(opened)
        return _write(library, _latest(library, what), Path(folder))


def export_tracking(
    what: str,
    *,
    store: str | Path | None = None,
    mlflow: str | None = None,
    experiment: str = "nervure",
    tensorboard: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> list[str]:
    """Write what the store has to MLflow, to TensorBoard, or both.

    MLflow gets one run for the whole, with the verdict as tags and the report's files, and below it one a job;
    TensorBoard one an arm and seed. Done again, nothing is there twice.

    Args:
        what: As in `export`.
        store: The store; None for the user's own.
        mlflow: The tracking address, such as ``sqlite:///mlflow.db``; None for none.
        experiment: The experiment in MLflow.
        tensorboard: The log folder; None for none.
        say: Told now and then how far it is.

    Returns:
        Where it went: a line each.

    Raises:
        UsageError: If there is nowhere to write to.
    """
    if mlflow is None and tensorboard is None:
        raise UsageError("there is nowhere to write to", expected="mlflow=, tensorboard= or both")
    from nervure.report.tracking import to_mlflow, to_tensorboard

    said = []
    with Store.open(store) as opened, tempfile.TemporaryDirectory() as aside:
        library = Library(opened)
        run = _latest(library, what)
        records = library.records(run)
        if tensorboard is not None:
            written = to_tensorboard(records, Path(tensorboard))
            said.append(f"{tensorboard}: {len(written)} TensorBoard files")
        if mlflow is not None:
            files = _write(library, run, Path(aside))
            tags = _tags(library, run)
            made = to_mlflow(
                records,
                uri=mlflow,
                key=run.id,
                name=run.name,
                tags=tags,
                files=files,
                experiment=experiment,
                say=say,
            )
            said.append(f"{mlflow}: experiment {experiment}, run {made}")
    return said


def _latest(library: Library, what: str) -> Run:
    name = what.removeprefix("compare-")
    comparison = name != what and (name in CONTESTS or name == prune.NAME)
    target = f"arena:{name}" if comparison else f"claim:{find_claim(what).id}"
    try:
        return library.latest(target)
    except UnknownId as error:
        again = what.replace("compare-", "compare ", 1) if comparison else f"run {what}"
        raise UsageError(f"the store has no record of {what}", try_=f"nervure {again}") from error


def _write(library: Library, run: Run, folder: Path) -> list[Path]:
    if run.kind == "comparison":
        return leaderboard_files(library.board(run), folder)
    card = find_claim(run.name).card
    return verdict_files(library.verdict(run), card, library.records(run), folder, command=repeat(run))


def _tags(library: Library, run: Run) -> dict[str, str]:
    """Return what a run came to as tags."""
    tags = {"nervure.target": run.setting.target, "nervure.params": run.setting.params}
    if run.kind == "comparison":
        board = library.board(run)
        best = {f"nervure.best.{table.case}": table.rows[0].arm for table in board.tables if table.rows}
        return tags | {"nervure.protocol": board.protocol, "nervure.command": board.command} | best
    verdict = library.verdict(run)
    checks = {f"nervure.check.{result.check.name}": str(result.outcome) for result in verdict.checks}
    tags |= {"nervure.verdict": str(verdict.outcome), "nervure.statement": verdict.statement}
    return tags | {"nervure.rehearsal": str(verdict.quick).lower(), "nervure.command": repeat(run)} | checks
