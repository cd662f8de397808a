"""compare curvature and the other contests: entrants measured on cases whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from nervure.cli.display import number, progress
from nervure.run import Resources

if TYPE_CHECKING:
    from nervure.app.comparisons import Comparison

Flag = Annotated[bool, Parameter(negative="")]
Json = Annotated[bool, Parameter(name="--json", negative="")]
Each = Annotated[Resources, Parameter(name="*")]
ANY = Resources()


def _command(name: str) -> Callable[..., int]:
    """Return the command of one contest; all take the same options."""

    def compare(
        *,
        entrant: list[str] | None = None,
        case: list[str] | None = None,
        seeds: int | None = None,
        quick: Flag = False,
        workers: int | None = None,
        executor: str = "local",
        resources: Each = ANY,
        store: str | None = None,
        report: Path = Path("reports"),
        as_json: Json = False,
        events: Flag = False,
    ) -> int:
        """Compare methods on cases whose truth is known.

        Args:
            entrant: Name of an entrant; repeat for several; all by default.
            case: Name of a case; repeat for several; all by default.
            seeds: Number of seeds.
            quick: Few cases, two seeds.
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

        with progress(f"compare {name}", silent=as_json, events=events) as on_event:
            found = app.compare(
                name,
                entrants=entrant or (),
                cases=case or (),
                seeds=seeds,
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

    return compare


curvature = _command("curvature")
delayed_generalisation = _command("delayed-generalisation")
generalisation_measures = _command("generalisation-measures")
shortcut_fixes = _command("shortcut-fixes")
similarity = _command("similarity")


def _print_tables(found: Comparison) -> None:
    console = Console()
    for table in found.board.tables:
        shown = Table("rank", "entrant", "mean", "95% interval", f"better than {table.baseline}? (Holm)")
        for row in table.rows:
            _, low, high = table.spread.get(row.arm, (0.0, math.nan, math.nan))
            better = "" if row.arm == table.baseline else str(row.outcome)
            shown.add_row(str(row.rank), row.arm, number(row.mean), f"{number(low)} to {number(high)}", better)
        console.print(f"\n[bold]{table.case}[/]")
        console.print(shown)
        for arm, problem in table.problems.items():
            console.print(f"{arm}: {problem}", markup=False, highlight=False)
    for warning in dict.fromkeys(text for record in found.board.records for text in record.warnings):
        console.print(f"note: {warning}", markup=False, highlight=False)
    print(found.files[-1])
