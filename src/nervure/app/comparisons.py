"""Compare the methods of a family on one model and data set, at equal budget."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nervure._kit import CouldNotRun
from nervure.app.jobs import ANY, OnEvent, do
from nervure.arena import outcome, prune
from nervure.arena.tasks import BATCH
from nervure.report import Board, case_tables, leaderboard_files
from nervure.run import Resources
from nervure.spec import Record, Status


@dataclass(frozen=True)
class Comparison:
    """Hold what came of a comparison.

    Args:
        board: Leaderboards, records and how they came about.
        files: The report's files: JSON, CSV, HTML.
    """

    board: Board
    files: list[Path]


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
    executor: str = "local",
    resources: Resources = ANY,
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
        workers: Jobs at a time; None takes one a core, or what the cluster holds; 0 works in this process.
        executor: ``"local"`` processes, ``"inline"`` in this one, or a cluster: ``"ray"``, ``"ray://host:port"``.
        resources: What a job gets on a cluster.
        store: Where records go; None for the user's own store.
        report: Folder for the report.
        on_event: Called with what happens.

    Returns:
        Tables, records and report files.

    Raises:
        CouldNotRun: If no entrant could be measured.
    """
    names = list(entrants) if entrants else list(prune.entrants(unit))
    count = seeds or (2 if quick else 3)
    budget = steps or (prune.QUICK_STEPS if quick else prune.STEPS)
    at = list(shares) if shares else list((prune.QUICK_SHARES if quick else prune.SHARES)[unit])
    jobs = prune.plan(model=model, data=data, unit=unit, shares=at, names=names, seeds=range(count), steps=budget)
    records = do(jobs, workers=workers, store=store, executor=executor, resources=resources, on_event=on_event)
    if not any(record.status is Status.DONE for record in records):
        error = next((record.error for record in records if record.error), "no record came back")
        raise CouldNotRun("no entrant could be measured", found=error.strip(), try_="--workers 0 for the trace")
    board = prune_board(records)
    return Comparison(board, leaderboard_files(board, Path(report)))


def prune_board(records: Sequence[Record]) -> Board:
    """Return the leaderboards of a comparison of pruners.

    Args:
        records: Records of one setting: model, data, unit and steps.

    Returns:
        The comparison.
    """
    params = records[0].job.params
    unit: prune.Unit = params.get("unit", "density")
    names = list(dict.fromkeys(record.job.arm for record in records))
    usual = prune.BASELINES[unit]
    baseline = usual if usual in names else next((n for n in names if n not in prune.DENSE), names[0])
    seeds = {record.job.seed for record in records}
    return Board(
        name=prune.report_name(unit),
        title=f"Pruning {params['model']} on {params['data']}",
        metric=prune.METRIC,
        tables=case_tables(records, metric=prune.METRIC, baseline=baseline),
        records=records,
        columns=outcome.COLUMNS,
        layers=outcome.LAYER,
        protocol=(
            f"{len(seeds)} seeds, paired: data split, initial weights and batches depend on the seed alone. Every "
            f"entrant spends {params['steps']} optimizer steps in all, pruning rounds included, with each of the "
            f"learning rates {', '.join(f'{rate:g}' for rate in prune.RATES)} (Adam, cosine, batch {BATCH}); the best "
            "on the validation split is measured once on the test split. Milliseconds are the least of ten forwards "
            "on one thread of a worker, beside whatever else runs here. Intervals are 95% t intervals; comparisons "
            f"with {baseline} are paired and corrected by Holm's method."
        ),
        command=_repeat(records, unit),
    )


def _repeat(records: Sequence[Record], unit: str) -> str:
    params = records[0].job.params
    words = ["nervure", "compare", "prune", "--unit", unit, "--model", params["model"], "--data", params["data"]]
    words += ["--seeds", str(len({record.job.seed for record in records})), "--steps", str(params["steps"])]
    words += [word for name in dict.fromkeys(record.job.arm for record in records) for word in ("--entrant", name)]
    made = [record for record in records if record.job.arm not in prune.DENSE]
    shares = dict.fromkeys(float(one.job.params.get("share", one.job.params.get("density"))) for one in made)
    return shlex.join(words + [word for share in shares for word in ("--share", f"{share:g}")])
