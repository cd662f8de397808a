"""Do the jobs that are not done yet, and hand out their Records as they end."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from nervure.run.attempt import DEFAULT_WORK
from nervure.spec import Job, Record

LOOK_SECONDS = 0.5


class Interrupted(KeyboardInterrupt):
    """Report that Ctrl-C or SIGTERM ended the run. What had ended is stored; start again to do the rest.

    Args:
        signum: The signal.
    """

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"interrupted by {signal.Signals(signum).name}; start again to do what is missing")

    @property
    def exit_code(self) -> int:
        """Return what a shell expects of a program ended by the signal."""
        return 128 + self.signum


class Executor(Protocol):
    """Do jobs, some at a time."""

    @property
    def slots(self) -> int:
        """Return how many jobs may be under way; it may change while they are."""

    def open(self, work: str, report: Callable[[Job, float, str], None]) -> None:
        """Get ready to do ``work``, and to report (job, share done, text)."""

    def submit(self, job: Job) -> None:
        """Begin a job; there is a free slot."""

    def wait(self, seconds: float) -> list[Record]:
        """Return the records of jobs that ended, after at most about `seconds` where there is none."""

    def close(self) -> None:
        """End everything at once."""


class Sink(Protocol):
    """Keep records, and know which jobs are done or taken."""

    def done(self, job_ids: Iterable[str]) -> set[str]:
        """Return which jobs are done."""

    def lease(self, job_id: str) -> bool:
        """Take a job, unless it is done or taken by another process."""

    def release(self, job_ids: Iterable[str]) -> None:
        """Give jobs back."""

    def add(self, record: Record) -> bool:
        """Store a record and give its job back."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Say what happened, for a display.

    Args:
        kind: ``"planned"`` once; then ``"started"``, ``"progress"`` and ``"ended"`` of a job; ``"elsewhere"`` when
            another process has ended it; ``"waiting"`` when another process is doing it.
        share: Share of all jobs that is done, in [0, 1].
        seconds_left: Estimate of the time left, or None where there is nothing to go by yet.
        job: The job.
        job_share: Share of the job that is done.
        text: What the job says of itself.
        record: What came of the job, when it ended here.
    """

    kind: Literal["planned", "started", "progress", "ended", "elsewhere", "waiting"]
    share: float
    seconds_left: float | None = None
    job: Job | None = None
    job_share: float = 0.0
    text: str = ""
    record: Record | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the event as JSON-ready values, the record by its status and error alone."""
        return {
            "kind": self.kind,
            "share": self.share,
            "seconds_left": self.seconds_left,
            "job": self.job.to_json() if self.job is not None else None,
            "job_share": self.job_share,
            "text": self.text,
            "status": str(self.record.status) if self.record is not None else None,
            "error": self.record.error if self.record is not None else None,
        }


def execute(
    jobs: Iterable[Job],
    *,
    executor: Executor,
    sink: Sink,
    work: str = DEFAULT_WORK,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Iterator[Record]:
    """Do the jobs that are not done yet and yield their records as they end, each already stored.

    Jobs another process has taken are waited for, and taken over if it dies. On Ctrl-C or SIGTERM the workers are
    killed and the jobs under way given back; a later run does what is missing.

    Args:
        jobs: The jobs; one that comes twice is done once.
        executor: Who does them.
        sink: Where records go.
        work: Name of the work function, ``"module:function"``; it takes (job, progress, notes).
        on_event: Called with what happens, in the calling thread.

    Yields:
        The records, failed ones too.
    """
    plan = {job.id: job for job in jobs}
    before = sink.done(plan)
    waiting = deque(job for job in plan.values() if job.id not in before)
    running: dict[str, Job] = {}
    elsewhere: dict[str, Job] = {}
    board = _Board(len(plan), len(before), on_event)
    announced: set[str] = set()
    next_look = 0.0
    with _stopping() as stop:
        try:
            executor.open(work, board.progress)
            board.tell("planned")
            while waiting or running or elsewhere:
                stop.check()
                while waiting and len(running) < executor.slots:
                    stop.check()
                    job = waiting.popleft()
                    # Noted first: an exception on the way gives the lease back too.
                    running[job.id] = job
                    if sink.lease(job.id):
                        board.tell("started", job)
                        executor.submit(job)
                    else:
                        elsewhere[job.id] = running.pop(job.id)
                        if job.id not in announced:
                            announced.add(job.id)
                            board.tell("waiting", job)
                with stop.at_once():
                    if running:
                        ended = executor.wait(LOOK_SECONDS)
                    else:
                        ended = []
                        time.sleep(LOOK_SECONDS if elsewhere else 0)
                for record in ended:
                    sink.add(record)
                    job = running.pop(record.job.id)
                    board.tell("ended", job, record=record)
                    yield record
                if elsewhere and time.monotonic() >= next_look:
                    next_look = time.monotonic() + LOOK_SECONDS
                    for job_id in sink.done(elsewhere):
                        board.tell("elsewhere", elsewhere.pop(job_id))
                    # The rest is asked for again, and taken if its process has died or failed.
                    if len(running) < executor.slots:
                        waiting.extend(elsewhere.values())
                        elsewhere.clear()
        finally:
            executor.close()
            if running:
                sink.release(running)


class _Board:
    """Know how far the run is."""

    def __init__(self, total: int, before: int, on_event: Callable[[Event], None]) -> None:
        self._total, self._before, self._ended = total, before, 0
        self._shares: dict[str, float] = {}
        self._on_event, self._start = on_event, time.monotonic()

    def progress(self, job: Job, share: float, text: str) -> None:
        self._shares[job.id] = min(max(share, 0.0), 1.0)
        self.tell("progress", job, text=text)

    def tell(self, kind: Any, job: Job | None = None, *, text: str = "", record: Record | None = None) -> None:
        if kind in ("ended", "elsewhere") and job is not None:
            self._shares.pop(job.id, None)
            self._ended += 1
        here = self._ended + sum(self._shares.values())
        todo = self._total - self._before
        spent = time.monotonic() - self._start
        self._on_event(
            Event(
                kind=kind,
                share=(self._before + here) / self._total if self._total else 1.0,
                seconds_left=spent * (todo - here) / here if here > 0 else None,
                job=job,
                job_share=self._shares.get(job.id, float(kind == "ended")) if job is not None else 0.0,
                text=text,
                record=record,
            )
        )


class _Stop:
    """Hold a signal until it may be acted on: never in the middle of storing a record."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self._now = False

    def __call__(self, signum: int, frame: object) -> None:
        self.pending = signum
        if self._now:
            self._now = False
            self.check()

    def check(self) -> None:
        if self.pending is not None:
            signum, self.pending = self.pending, None
            raise Interrupted(signum)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        self._now = True
        try:
            self.check()
            yield
        finally:
            self._now = False


@contextmanager
def _stopping() -> Iterator[_Stop]:
    stop = _Stop()
    # Only the main thread may have handlers; elsewhere its owner closes the generator, which ends the run as well.
    caught = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {signum: signal.signal(signum, stop) for signum in caught}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        if stop.pending is not None:
            # It came when the run was ending anyway: whoever is in charge now shall have it.
            signal.raise_signal(stop.pending)
