"""From Records to numbers by arm and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nervure._kit import UsageError
from nervure.spec import Record, Status, canonical_json

Values = dict[tuple[str, str], dict[int, float]]
"""(arm, metric) -> seed -> final value."""


def newest(records: Sequence[Record]) -> list[Record]:
    """Keep one record a job: the one that is done, else the last.

    Args:
        records: Records in the order they were written.

    Returns:
        The records kept, in the order their jobs first came.
    """
    kept: dict[str, Record] = {}
    for record in records:
        before = kept.get(record.job.id)
        if before is None or before.status is not Status.DONE or record.status is Status.DONE:
            kept[record.job.id] = record
    return list(kept.values())


def tabulate(records: Sequence[Record]) -> Values:
    """Return the final values of the jobs that are done.

    Args:
        records: One record a job, all of one target and case, each arm with one set of parameters.

    Returns:
        The values by (arm, metric) and seed.

    Raises:
        UsageError: If records of different experiments are mixed, or two jobs measured the same thing.
    """
    settings = {(record.job.target, record.job.case) for record in records}
    params = {(record.job.arm, canonical_json(dict(record.job.params))) for record in records}
    if len(settings) > 1 or len(params) > len({arm for arm, _ in params}):
        raise UsageError(
            "records of different experiments are mixed",
            expected="one target, one case, and one set of parameters an arm",
            found=f"{len(settings)} targets or cases, {len(params)} sets of parameters",
            try_="select the records by the ids of the planned jobs",
        )
    table: Values = {}
    for record in records:
        if record.status is not Status.DONE:
            continue
        for arm, metrics in record.values().items():
            for metric, value in metrics.items():
                column = table.setdefault((arm, metric), {})
                if record.job.seed in column:
                    raise UsageError(
                        f"two jobs measured {metric!r} of arm {arm!r} with seed {record.job.seed}",
                        try_="select the records by the ids of the planned jobs",
                    )
                column[record.job.seed] = value
    return table


def failures(records: Sequence[Record]) -> list[str]:
    """Describe the jobs that did not end well, one sentence each.

    Args:
        records: One record a job.

    Returns:
        The sentences.
    """
    return [
        f"Seed {record.job.seed}{'' if record.job.arm == '*' else f' of arm {record.job.arm!r}'} ended "
        f"{record.status.value}{f': {first_line(record.error)}' if record.error else ''}."
        for record in records
        if record.status is not Status.DONE
    ]


def first_line(text: str) -> str:
    """Return the first line of an error's text without its final stop.

    Args:
        text: The text.

    Returns:
        The line, at most 200 characters.
    """
    return text.strip().split("\n")[0][:200].rstrip(".")


def usable(column: dict[int, float], seed: int) -> bool:
    """Say whether a seed has a finite value in a column of the table.

    Args:
        column: Seed -> value.
        seed: The seed.

    Returns:
        Whether there is a number to compare.
    """
    return math.isfinite(column.get(seed, math.nan))
