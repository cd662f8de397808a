"""Run jobs in this process, one after the other."""

from __future__ import annotations

from collections.abc import Callable

from nervure.run.attempt import attempt
from nervure.spec import Job, Record


class Inline:
    """Run jobs in this process: for debugging, and for jobs that need what only this process has."""

    slots = 1

    def __init__(self) -> None:
        self._job: Job | None = None
        self._work = ""
        self._report: Callable[[Job, float, str], None] = lambda job, share, text: None

    def open(self, work: str, report: Callable[[Job, float, str], None]) -> None:
        """Get ready.

        Args:
            work: Name of the work function.
            report: Called with (job, share done, text).
        """
        self._work, self._report = work, report

    def submit(self, job: Job) -> None:
        """Take a job.

        Args:
            job: The job.
        """
        self._job = job

    def wait(self, seconds: float) -> list[Record]:
        """Do the job that was taken, however long it takes.

        Args:
            seconds: Not used: there is nobody else to wait for.

        Returns:
            Its record, or nothing where there is no job.
        """
        if self._job is None:
            return []
        job, self._job = self._job, None
        return [attempt(job, self._work, lambda share, text: self._report(job, share, text))]

    def close(self) -> None:
        """Forget the job that was taken."""
        self._job = None
