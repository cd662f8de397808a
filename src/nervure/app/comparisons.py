"""Compare the methods of a family on one model and data set, at equal budget."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nervure._kit import CouldNotRun
from nervure.app.jobs import OnEvent, do
from nervure.arena import outcome, prune
from nervure.arena.tasks import BATCH
from nervure.report import CaseTable, case_tables, leaderboard_files
from nervure.spec import Record, Status


@dataclass(frozen=True)
class Comparison:
    """Hold what came of a comparison.

    Args:
        tables: One leaderboard a share.
        records: Their records.
        files: The report's files: JSON, CSV, HTML.
        baseline: The entrant the others are compared with.
    """

    tables: list[CaseTable]
    records: list[Record]
    files: list[Path]
    baseline: str


def compare_prune(
    *,
    model: str = "lenet-300-100",
    data: str = "fashion-mnist",
    entrants: Sequence[str] | None = None,
    unit: prune.Unit = "density",
    shares: Sequence[float] | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    quick: bool = False,
    workers: int | None = None,
    store: str | Path | None = None,
    report: str | Path = "reports",
    on_event: OnEvent = lambda event: None,
) -> Comparison:
    """Compare pruners at equal total optimizer steps.

    Args:
        model: A zoo model, or ``path.py:factory``; a factory that takes ``scale`` also gives the small dense baseline.
        data: A named data set, an .npz, a .csv, a folder of images, or ``path.py:factory``.
        entrants: Names of entrants; all when None.
        unit: What is counted: ``"density"`` compares pruners of single weights; ``"macs"``, ``"params"`` and
            ``"bytes"`` those that cut channels. The two are never mixed.
        shares: Shares to keep; 50, 20, 10, 5 and 2% of the weights, or 75, 50, 35 and 25% of a cost, when None.
        seeds: Number of seeds; 3 when None, 2 when quick.
        steps: Optimizer steps of one training in all, pruning rounds included.
        quick: Two shares, 200 steps, two seeds.
        workers: Worker processes; None takes one a core, 0 works in this process.
        store: Where records go; None for the user's own store.
        report: Folder for the report.
        on_event: Called with what happens.

    Returns:
        Tables, records and report files.

    Raises:
        CouldNotRun: If no entrant could be measured.
    """
    names = list(entrants) if entrants else list(prune.entrants(unit))
    usual = prune.BASELINES[unit]
    baseline = usual if usual in names else next((n for n in names if n not in prune.DENSE), names[0])
    count = seeds or (2 if quick else 3)
    budget = steps or (prune.QUICK_STEPS if quick else prune.STEPS)
    at = list(shares) if shares else list((prune.QUICK_SHARES if quick else prune.SHARES)[unit])
    jobs = prune.plan(model=model, data=data, unit=unit, shares=at, names=names, seeds=range(count), steps=budget)
    records = do(jobs, workers=workers, store=store, on_event=on_event)
    if not any(record.status is Status.DONE for record in records):
        error = next((record.error for record in records if record.error), "no record came back")
        raise CouldNotRun("no entrant could be measured", found=error.strip(), try_="--workers 0 for the trace")
    tables = case_tables(records, metric=prune.METRIC, baseline=baseline)
    files = leaderboard_files(
        tables,
        records,
        Path(report),
        name=prune.report_name(unit),
        title=f"Pruning {model} on {data}",
        metric=prune.METRIC,
        columns=outcome.COLUMNS,
        layers=outcome.LAYER,
        protocol=(
            f"{count} seeds, paired: data split, initial weights and batches depend on the seed alone. Every entrant "
            f"spends {budget} optimizer steps in all, pruning rounds included, with each of the learning rates "
            f"{', '.join(f'{rate:g}' for rate in prune.RATES)} (Adam, cosine, batch {BATCH}); the best on the "
            "validation split is measured once on the test split. Milliseconds are the least of ten forwards on one "
            "thread of a worker, beside whatever else runs here. Intervals are 95% t intervals; comparisons with "
            f"{baseline} are paired and corrected by Holm's method."
        ),
        command=_repeat(model, data, names, unit, at, count, budget),
    )
    return Comparison(tables, records, files, baseline)


def _repeat(
    model: str, data: str, names: Sequence[str], unit: str, at: Sequence[float], count: int, budget: int
) -> str:
    words = ["nervure", "compare", "prune", "--unit", unit, "--model", model, "--data", data, "--seeds", str(count)]
    words += ["--steps", str(budget)]
    words += [word for name in names for word in ("--entrant", name)]
    words += [word for share in at for word in ("--share", f"{share:g}")]
    return shlex.join(words)
