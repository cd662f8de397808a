"""Run a paper's claim: plan, do, judge, report."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nervure._kit import BadData, CouldNotRun, UsageError
from nervure.app.jobs import ANY, OnEvent, do
from nervure.arena import find_claim
from nervure.core.factory import fingerprint
from nervure.data import fetch_fashion_mnist, names
from nervure.report import verdict_files
from nervure.run import Resources, plan_claim
from nervure.spec import Claim, Job, Record, Status, Verdict
from nervure.stats import verdict

MOST_SEEDS = 40


@dataclass(frozen=True)
class Ran:
    """Hold what came of a run.

    Args:
        verdict: The verdict.
        records: Its records.
        files: The report's files: JSON, CSV, HTML.
    """

    verdict: Verdict
    records: list[Record]
    files: list[Path]


def run(
    claim_id: str,
    *,
    seeds: int | None = None,
    quick: bool = False,
    data: str | None = None,
    fallback: str | None = None,
    until_decided: bool = False,
    workers: int | None = None,
    executor: str = "local",
    resources: Resources = ANY,
    store: str | Path | None = None,
    report: str | Path = "reports",
    on_event: OnEvent = lambda event: None,
    say: Callable[[str], None] = lambda text: None,
) -> Ran:
    """Run a paper's claim and judge it.

    Args:
        claim_id: ``card`` or ``card/claim``.
        seeds: Number of seeds; the claim's own when None.
        quick: Rehearse with a scaled-down budget; the verdict is then marked as a rehearsal.
        data: Data set in place of the claim's own.
        fallback: Data set to use where that one cannot be had.
        until_decided: Go on adding seeds under the always-valid interval until the claim is decided.
        workers: Jobs at a time; None takes one a core, or what the cluster holds; 0 works in this process.
        executor: ``"local"`` processes, ``"inline"`` in this one, or a cluster: ``"ray"``, ``"ray://host:port"``.
        resources: What a job gets on a cluster.
        store: Where records go; None for the user's own store.
        report: Folder for the report.
        on_event: Called with what happens.
        say: Called with a line of text now and then.

    Returns:
        Verdict, records and report files.

    Raises:
        UsageError: If an option is out of range or the claim reads no data set that could be replaced.
        CouldNotRun: If no seed could be measured.
    """
    claim = find_claim(claim_id)
    if seeds is not None and seeds < 1:
        raise UsageError("there is no seed to run", expected="--seeds 1 or more", found=seeds)
    chosen, notes = _choose_data(claim, data, fallback, say)
    params: dict[str, Any] = {"quick": quick} if quick else {}
    if chosen is not None:
        params |= {"data": chosen} | ({} if chosen in names() else {"data_content": fingerprint(chosen)})
    count = seeds or claim.seeds
    while True:
        # Ten times the stated minutes: a slow machine is no reason to fail, a hung job is.
        jobs = plan_claim(claim.id, seeds=count, params=params, seconds=600 * claim.minutes)
        records = do(jobs, workers=workers, store=store, executor=executor, resources=resources, on_event=on_event)
        _refuse_nothing(records, claim)
        found = verdict(claim, records, quick=quick, until_decided=until_decided)
        undecided = any(result.outcome == "inconclusive" for result in found.checks)
        if not until_decided or not undecided or count >= MOST_SEEDS:
            break
        count = min(MOST_SEEDS, count + 2)
        say(f"not decided yet; going on with {count} seeds")
    command = repeat(claim.id, jobs, quick=quick, data=chosen, until_decided=until_decided)
    found = _with_notes(found, notes, records)
    return Ran(found, records, verdict_files(found, claim.card, records, Path(report), command=command))


def repeat(claim_id: str, jobs: Sequence[Job], *, quick: bool, data: str | None, until_decided: bool) -> str:
    """Return the command that repeats a run.

    Args:
        claim_id: The claim.
        jobs: The jobs of the last look.
        quick: As in `run`.
        data: As in `run`.
        until_decided: As in `run`.

    Returns:
        One line for a shell.
    """
    words = ["nervure", "run", claim_id, "--seeds", str(len(jobs))]
    words += ["--quick"] * quick + ["--until-decided"] * until_decided + (["--data", data] if data else [])
    return shlex.join(words)


def _choose_data(
    claim: Claim, data: str | None, fallback: str | None, say: Callable[[str], None]
) -> tuple[str | None, list[str]]:
    """Return the data set that replaces the claim's own, if any, and what a reader must know of it.

    Raises:
        UsageError: If the claim reads no data set.
        BadData: If Fashion-MNIST cannot be had and there is no fallback.
    """
    if data is not None and not claim.data:
        raise UsageError(f"{claim.id} reads no data set", try_="leaving --data out")
    wanted = data or (claim.data[0] if claim.data else None)
    if wanted == "fashion-mnist":
        try:
            fetch_fashion_mnist(say=say)
        except BadData:
            if fallback is None:
                raise
            return fallback, [f"fashion-mnist could not be had on this machine; {fallback} stands in for it."]
    if wanted is None or wanted in claim.data:
        return None, []
    return wanted, [f"Run on {wanted}; the claim was set up for {', '.join(claim.data)}."]


def _refuse_nothing(records: Sequence[Record], claim: Claim) -> None:
    if any(record.status is Status.DONE for record in records):
        return
    error = next((record.error for record in records if record.error), "no record came back")
    raise CouldNotRun(f"no seed of {claim.id} could be measured", found=error.strip(), try_="--workers 0 for the trace")


def _with_notes(found: Verdict, notes: Sequence[str], records: Sequence[Record]) -> Verdict:
    warned = dict.fromkeys(text for record in records for text in record.warnings)
    return dataclasses.replace(found, notes=(*notes, *found.notes, *warned))
