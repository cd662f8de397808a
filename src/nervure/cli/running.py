"""run, compare, export and data: the commands that do work, with live progress."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from nervure.cli.display import number, progress
from nervure.run import Resources

if TYPE_CHECKING:
    from nervure.app.claims import Ran
    from nervure.app.comparisons import Comparison

Flag = Annotated[bool, Parameter(negative="")]
Json = Annotated[bool, Parameter(name="--json", negative="")]
Each = Annotated[Resources, Parameter(name="*")]
ANY = Resources()
Unit = Literal["density", "macs", "params", "bytes"]
Shares = Annotated[list[float] | None, Parameter(name=["--share", "--density"])]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(
    claim: str,
    *,
    seeds: int | None = None,
    quick: Flag = False,
    data: str | None = None,
    fallback: str | None = None,
    until_decided: Flag = False,
    workers: int | None = None,
    executor: str = "local",
    resources: Each = ANY,
    store: str | None = None,
    report: Path = Path("reports"),
    as_json: Json = False,
    events: Flag = False,
) -> int:
    """Check a paper's claim here: holds, does not hold, or inconclusive.

    Args:
        claim: A paper's id, or id/claim where it has several.
        seeds: Number of seeds; the claim's own by default.
        quick: Rehearse at a fraction of the budget; the verdict is marked as a rehearsal.
        data: Data set in place of the claim's own.
        fallback: Data set to use where that one cannot be had.
        until_decided: Add seeds, under an interval that allows for it, until the claim is decided.
        workers: Jobs at a time; one a core, or what the cluster holds, by default; 0 works in this process.
        executor: local processes, inline in this one, or a cluster: ray, ray://host:port.
        resources: What a job gets on a cluster.
        store: Where records go: a file or a PostgreSQL address; the user's own store by default.
        report: Folder for the report.
        as_json: Print JSON and nothing else.
        events: Print what happens as lines of JSON, for a program that follows the run.

    Returns:
        0 if it holds, 1 if it was not shown to hold.
    """
    from nervure import app

    with progress(claim, silent=as_json, events=events) as on_event:
        ran = app.run(
            claim,
            seeds=seeds,
            quick=quick,
            data=data,
            fallback=fallback,
            until_decided=until_decided,
            workers=workers,
            executor=executor,
            resources=resources,
            store=store,
            report=report,
            on_event=on_event,
            say=_say,
        )
    if as_json:
        print(json.dumps({**ran.verdict.to_json(), "files": [str(path) for path in ran.files]}))
    elif not events:
        _print_verdict(ran)
    return ran.verdict.outcome.exit_code


def _print_verdict(ran: Ran) -> None:
    from nervure.report import arm_rows

    console, verdict = Console(), ran.verdict
    console.print(f"\n[bold]{verdict.claim_id}[/]: [bold]{verdict.outcome}[/]" + " (rehearsal)" * verdict.quick)
    console.print(verdict.statement, markup=False)
    checks = Table("check", "outcome", "mean", "95% interval", "asked", "seeds")
    for result in verdict.checks:
        reading = result.reading
        span = f"{number(reading.low)} to {number(reading.high)}"
        checks.add_row(result.check.name, str(result.outcome), number(reading.mean), span, reading.asked, str(result.n))
    console.print(checks)
    metrics = list(dict.fromkeys(result.check.metric for result in verdict.checks))
    arms = Table("arm", "metric", "mean", "95% interval", "seeds")
    for row in arm_rows(ran.records):
        if row.metric in metrics:
            span = f"{number(row.low)} to {number(row.high)}" if row.n > 1 else ""
            arms.add_row(row.arm, row.metric, number(row.mean), span, str(row.n))
    console.print(arms)
    for arm, outcome in verdict.sabotage.items():
        console.print(f"sabotage {arm!r} in the method's place: {outcome}", markup=False, highlight=False)
    for note in verdict.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    print(ran.files[-1])


def compare_prune(
    *,
    model: str = "lenet-300-100",
    data: str = "fashion-mnist",
    entrant: list[str] | None = None,
    unit: Unit = "density",
    share: Shares = None,
    seeds: int | None = None,
    steps: int | None = None,
    quick: Flag = False,
    workers: int | None = None,
    executor: str = "local",
    resources: Each = ANY,
    store: str | None = None,
    report: Path = Path("reports"),
    as_json: Json = False,
    events: Flag = False,
) -> int:
    """Compare pruning methods on your own network and data, at equal total optimizer steps.

    Args:
        model: A zoo model, or path.py:factory. A factory that takes scale= also gives the small dense baseline.
        data: digits, fashion-mnist, wine, breast-cancer, an .npz, a .csv, a folder of images, or path.py:factory.
        entrant: Name of an entrant; repeat for several; all by default.
        unit: density compares pruners of single weights; macs, params and bytes those that cut channels.
        share: Share to keep; repeat for several.
        seeds: Number of seeds; 3 by default.
        steps: Optimizer steps of one training in all, pruning rounds included.
        quick: Two shares, two seeds, 200 steps.
        workers: Jobs at a time; one a core, or what the cluster holds, by default; 0 works in this process.
        executor: local processes, inline in this one, or a cluster: ray, ray://host:port.
        resources: What a job gets on a cluster.
        store: Where records go; the user's own store by default.
        report: Folder for the report.
        as_json: Print JSON and nothing else.
        events: Print what happens as lines of JSON, for a program that follows the run.

    Returns:
        0.
    """
    from nervure import app

    with progress("compare prune", silent=as_json, events=events) as on_event:
        found = app.compare_prune(
            model=model,
            data=data,
            entrants=entrant,
            unit=unit,
            shares=share,
            seeds=seeds,
            steps=steps,
            quick=quick,
            workers=workers,
            executor=executor,
            resources=resources,
            store=store,
            report=report,
            on_event=on_event,
        )
    if as_json:
        print(found.files[0].read_text(encoding="utf-8"))
    elif not events:
        _print_tables(found)
    return 0


def _print_tables(found: Comparison) -> None:
    from nervure.report import no_faster

    console = Console()
    for table in found.board.tables:
        shown = Table(
            "rank", "entrant", "accuracy", "95% interval", f"better than {table.baseline}? (Holm)", "ms, batch 64"
        )
        for row in table.rows:
            _, low, high = table.spread.get(row.arm, (0.0, math.nan, math.nan))
            better = "" if row.arm == table.baseline else str(row.outcome)
            took = number(table.means.get(row.arm, {}).get("ms_64", math.nan))
            shown.add_row(str(row.rank), row.arm, number(row.mean), f"{number(low)} to {number(high)}", better, took)
        console.print(f"\n[bold]{table.unit} {table.share:.3g}[/]")
        console.print(shown)
        if slow := no_faster(table):
            console.print(f"No faster than dense at batch 64: {', '.join(slow)}", highlight=False)
        for arm, problem in table.problems.items():
            console.print(f"{arm}: {problem}", markup=False, highlight=False)
    print(found.files[-1])


def export(
    what: str,
    folder: Path | None = None,
    *,
    store: str | None = None,
    to: Path = Path("reports"),
    mlflow: str | None = None,
    experiment: str = "nervure",
    tensorboard: Path | None = None,
) -> int:
    """Write a verdict or leaderboard with its raw records as JSON, CSV and one HTML file, or all pages as a site.

    Args:
        what: A paper's id, id/claim, compare-prune, compare- and a comparison's name, or site.
        folder: Folder to write to; the one of --to by default, for a site it must be given.
        store: Store to read from; the user's own by default.
        to: The same, named; for a site the folder that audits and landscapes are read from.
        mlflow: Write to this MLflow tracking address instead, such as sqlite:///mlflow.db.
        experiment: The experiment in MLflow.
        tensorboard: Write TensorBoard's files to this folder instead.

    Returns:
        0.

    Raises:
        UsageError: If a site has no folder, or a tracker is asked to take one.
    """
    tracked = mlflow is not None or tensorboard is not None
    if what == "site":
        from nervure._kit import UsageError
        from nervure.cli.serving import write_site

        if folder is None or tracked:
            raise UsageError("a site needs a folder of its own", expected="nervure export site DIR")
        return write_site(folder, store=store, report=to)
    from nervure import app

    if tracked:
        for line in app.export_tracking(
            what, store=store, mlflow=mlflow, experiment=experiment, tensorboard=tensorboard, say=_say
        ):
            print(line)
    if folder is not None or not tracked:
        for path in app.export(what, store=store, folder=folder or to):
            print(path)
    return 0


def data(name: str) -> int:
    """Bring a data set into the cache and say what it holds.

    Args:
        name: Name of a data set, or a file or folder of your own.

    Returns:
        0.
    """
    from nervure.data import fetch_fashion_mnist, load

    if name == "fashion-mnist":
        _say(f"in {fetch_fashion_mnist(say=_say)}")
    found: Any = load(name)
    print(
        f"{found.name}: {len(found.train_x)} training and {len(found.test_x)} test samples "
        f"of shape {found.shape}, {found.classes} classes"
    )
    return 0
