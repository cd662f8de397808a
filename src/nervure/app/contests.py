"""Hold a contest: entrants measured on cases whose truth is known."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from nervure._kit import CouldNotRun
from nervure.app.comparisons import Comparison
from nervure.app.jobs import ANY, OnEvent, do
from nervure.arena.contest import Contest, contest
from nervure.report import Board, contest_tables, leaderboard_files
from nervure.run import Resources
from nervure.spec import Record, Status


def compare(
    name: str,
    *,
    entrants: Sequence[str] = (),
    cases: Sequence[str] = (),
    seeds: int | None = None,
    quick: bool = False,
    workers: int | None = None,
    executor: str = "local",
    resources: Resources = ANY,
    store: str | Path | None = None,
    report: str | Path = "reports",
    on_event: OnEvent = lambda event: None,
) -> Comparison:
    """Compare the entrants of a contest.

    Args:
        name: The contest, as in `nervure.arena.contest.CONTESTS`.
        entrants: Who takes part; all when empty, the baselines always.
        cases: The cases; all when empty.
        seeds: Number of seeds; the contest's own when None.
        quick: Few cases, two seeds.
        workers: Jobs at a time; None takes one a core, or what the cluster holds; 0 works in this process.
        executor: ``"local"`` processes, ``"inline"`` in this one, or a cluster: ``"ray"``, ``"ray://host:port"``.
        resources: What a job gets on a cluster.
        store: Where records go; None for the user's own store.
        report: Folder for the report.
        on_event: Called with what happens.

    Returns:
        Tables, records and report files.

    Raises:
        CouldNotRun: If nothing could be measured.
    """
    found = contest(name)
    jobs = found.plan(entrants=entrants, cases=cases, seeds=seeds, quick=quick)
    records = do(jobs, workers=workers, store=store, executor=executor, resources=resources, on_event=on_event)
    if not any(record.status is Status.DONE for record in records):
        error = next((record.error for record in records if record.error), "no record came back")
        raise CouldNotRun("nothing could be measured", found=error.strip(), try_="--workers 0 for the trace")
    board = contest_board(found, records)
    return Comparison(board, leaderboard_files(board, Path(report)))


def contest_board(found: Contest, records: Sequence[Record]) -> Board:
    """Return the leaderboards of a contest.

    Args:
        found: The contest.
        records: Its records, of one setting.

    Returns:
        The comparison.
    """
    warned = list(dict.fromkeys(text for record in records for text in record.warnings))
    seeds, cases = {record.job.seed for record in records}, {record.job.case for record in records}
    params = records[0].job.params
    quick = bool(params["quick"])
    usual = set(found.quick if quick else found.cases)
    entrants = [name for name in params["entrants"] if set(params["entrants"]) != set(found.entrants)]
    words = ["nervure", "compare", found.name, *(["--quick"] * quick), "--seeds", str(len(seeds))]
    words += [word for name in entrants for word in ("--entrant", name)]
    words += [word for case in found.cases if case in cases and cases != usual for word in ("--case", case)]
    return Board(
        name=f"compare-{found.name}",
        title=found.title,
        metric=found.metric,
        tables=contest_tables(records, metric=found.metric, better=found.better, baselines=found.baselines),
        records=records,
        columns=found.columns,
        protocol=" ".join([f"{len(seeds)} seeds, paired. {found.protocol}", *(f"{text}." for text in warned)]),
        command=shlex.join(words),
    )
