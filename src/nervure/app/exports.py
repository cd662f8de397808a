"""Write a verdict or leaderboard again from the stored records."""

from __future__ import annotations

from pathlib import Path

from nervure._kit import UsageError
from nervure.app.contests import write
from nervure.arena import find_claim, outcome, prune
from nervure.arena.contest import CONTESTS, contest
from nervure.report import case_tables, leaderboard_files, verdict_files
from nervure.spec import Record, canonical_json
from nervure.stats import verdict
from nervure.stats.table import newest
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
        if what.removeprefix("compare-") in CONTESTS:
            return _contest(newest(opened.records(target=f"arena:{what.removeprefix('compare-')}")), what, Path(folder))
        if what == "compare-prune":
            return _leaderboard(newest(opened.records(target=f"arena:{prune.NAME}")), Path(folder))
        claim = find_claim(what)
        records = _latest_setting(newest(opened.records(target=f"claim:{claim.id}")), what)
    quick = bool(records[0].job.params.get("quick"))
    command = f"nervure run {claim.id} --seeds {len(records)}" + " --quick" * quick
    return verdict_files(verdict(claim, records, quick=quick), claim.card, records, Path(folder), command=command)


def _latest_setting(records: list[Record], what: str) -> list[Record]:
    if not records:
        raise UsageError(f"the store has no record of {what}", try_=f"nervure run {what}")
    last = canonical_json(dict(max(records, key=lambda record: record.started).job.params))
    return [record for record in records if canonical_json(dict(record.job.params)) == last]


def _contest(records: list[Record], what: str, folder: Path) -> list[Path]:
    name = what.removeprefix("compare-")
    if not records:
        raise UsageError("the store has no such comparison", try_=f"nervure compare {name}")
    last = canonical_json(dict(max(records, key=lambda record: record.started).job.params))
    chosen = [record for record in records if canonical_json(dict(record.job.params)) == last]
    return write(contest(name), chosen, folder, command=f"nervure compare {name}").files


def _leaderboard(records: list[Record], folder: Path) -> list[Path]:
    if not records:
        raise UsageError("the store has no comparison", try_="nervure compare prune")

    def setting(record: Record) -> str:
        return canonical_json(
            {key: value for key, value in record.job.params.items() if key not in ("density", "share")}
        )

    last = setting(max(records, key=lambda record: record.started))
    chosen = [record for record in records if setting(record) == last]
    params = chosen[0].job.params
    arms = {record.job.arm for record in chosen}
    unit = str(params.get("unit", "density"))
    baseline = prune.BASELINES[unit] if prune.BASELINES[unit] in arms else min(arms)
    return leaderboard_files(
        case_tables(chosen, metric=prune.METRIC, baseline=baseline),
        chosen,
        folder,
        name=prune.report_name(unit),
        title=f"Pruning {params['model']} on {params['data']}",
        metric=prune.METRIC,
        columns=outcome.COLUMNS,
        layers=outcome.LAYER,
        protocol=f"From the store: {params['steps']} optimizer steps in all for every entrant.",
        command=(
            f"nervure compare prune --unit {unit} --model {params['model']} --data {params['data']} "
            f"--steps {params['steps']}"
        ),
    )
