"""Do jobs on the chosen workers and store, and read their records back."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from nervure._kit import UsageError
from nervure.run import Event, Inline, Local, execute
from nervure.spec import Job, Record
from nervure.stats.table import newest
from nervure.store import Store

OnEvent = Callable[[Event], None]


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def do(
    jobs: Sequence[Job], *, workers: int | None, store: str | Path | None, on_event: OnEvent = lambda event: None
) -> list[Record]:
    """Do the jobs that are not done and return the newest record of each.

    Args:
        jobs: The jobs.
        workers: Worker processes; 0 works in this process, None takes one a core.
        store: Path or address of the store, or None for the user's own.
        on_event: Called with what happens.

    Returns:
        The records, in the order of the jobs.

    Raises:
        UsageError: If the number of workers is negative.
    """
    if workers is not None and workers < 0:
        raise UsageError("the number of workers is negative", expected="0 or more", found=workers)
    count = min(len(jobs), cores() if workers is None else workers)
    with Store.open(store) as sink:
        executor = Inline() if count == 0 else Local(count)
        for _ in execute(jobs, executor=executor, sink=sink, on_event=on_event):
            pass
        found = {record.job.id: record for record in newest(sink.records(job_ids=[job.id for job in jobs]))}
    return [found[job.id] for job in jobs if job.id in found]
