"""Do jobs on the chosen workers and store, and read their records back."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from nervure._kit import UsageError
from nervure.run import Event, Executor, Inline, Local, Ray, Resources, execute
from nervure.spec import Job, Record
from nervure.stats.table import newest
from nervure.store import Store

OnEvent = Callable[[Event], None]
ANY = Resources()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def do(
    jobs: Sequence[Job],
    *,
    workers: int | None,
    store: str | Path | None,
    executor: str = "local",
    resources: Resources = ANY,
    on_event: OnEvent = lambda event: None,
) -> list[Record]:
    """Do the jobs that are not done and return the newest record of each.

    Args:
        jobs: The jobs.
        workers: Jobs at a time; 0 works in this process, None takes one a core, or what the cluster holds.
        store: Path or address of the store, or None for the user's own.
        executor: ``"local"`` processes, ``"inline"`` in this one, or a cluster: ``"ray"``, ``"ray://host:port"``.
        resources: What a job gets on a cluster.
        on_event: Called with what happens.

    Returns:
        The records, in the order of the jobs.
    """
    doer = choose(executor, jobs=len(jobs), workers=workers, resources=resources)
    with Store.open(store) as sink:
        for _ in execute(jobs, executor=doer, sink=sink, on_event=on_event):
            pass
        found = {record.job.id: record for record in newest(sink.records(job_ids=[job.id for job in jobs]))}
    return [found[job.id] for job in jobs if job.id in found]


def choose(executor: str, *, jobs: int, workers: int | None, resources: Resources = ANY) -> Executor:
    """Return who does the jobs.

    Args:
        executor: As in `do`; a bare ``host:port`` is that of a cluster this machine belongs to.
        jobs: How many jobs there are.
        workers: As in `do`.
        resources: As in `do`.

    Returns:
        The executor.

    Raises:
        UsageError: If there is no such executor, or it does not go with the number of workers or the resources.
    """
    if workers is not None and workers < 0:
        raise UsageError("the number of workers is negative", expected="0 or more", found=workers)
    if executor == "ray" or ":" in executor:
        if workers == 0:
            raise UsageError("a cluster does not work in this process", try_="--executor inline")
        return Ray(None if executor == "ray" else executor, slots=workers, resources=resources)
    if executor not in ("local", "inline"):
        raise UsageError("there is no such executor", expected="local, inline, ray or ray://host:port", found=executor)
    if resources != ANY:
        raise UsageError("CPUs, GPUs and memory of a job are set aside on a cluster alone", try_="--executor ray")
    if executor == "inline" and workers:
        raise UsageError("one process does one job at a time", expected="no --workers", found=workers)
    count = 0 if executor == "inline" else min(jobs, cores() if workers is None else workers)
    return Local(count) if count else Inline()
