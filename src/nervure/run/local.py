"""Run jobs in warm worker processes on this machine, one torch thread each."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nervure._kit import UsageError
from nervure.run.attempt import HARD_LIMIT, environment
from nervure.spec import Job, Record, Status

_START = "from nervure.run.worker import serve; serve()"
_ONE_THREAD = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_LOG_TAIL = 2000
Report = Callable[[Job, float, str], None]


class Local:
    """Run jobs in worker processes that stay warm from one job to the next.

    A worker speaks JSON over its own pipe, so nothing is unpickled, the script that started the run needs no main
    guard, and a worker that crashes takes its own job with it and no other.

    Args:
        workers: How many, at least 1; by default the number of CPUs this process may use.

    Raises:
        UsageError: If the number is below 1.
    """

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise UsageError("there must be a worker", expected="at least 1", found=workers)
        self.slots = workers or _cpus()
        self._workers: list[_Worker] = []

    def open(self, work: str, report: Report) -> None:
        """Get ready; a worker process starts with its first job.

        Args:
            work: Name of the work function, importable in a new process.
            report: Called with (job, share done, text).
        """
        self._report = report
        self._inbox: queue.SimpleQueue[tuple[_Worker, int, dict[str, Any] | None]] = queue.SimpleQueue()
        self._logs = tempfile.TemporaryDirectory(prefix="nervure-")
        folder = Path(self._logs.name)
        self._workers = [_Worker(work, folder / f"{number}.log", self._inbox) for number in range(self.slots)]

    def submit(self, job: Job) -> None:
        """Give a job to an idle worker.

        Args:
            job: The job; there must be fewer than `slots` under way.
        """
        next(worker for worker in self._workers if worker.job is None).begin(job)

    def wait(self, seconds: float) -> list[Record]:
        """Wait for messages, report progress, and kill workers far beyond their job's time.

        Args:
            seconds: How long to wait at most for the first message.

        Returns:
            The records of the jobs that ended.
        """
        ended = []
        try:
            while True:
                worker, life, message = self._inbox.get(timeout=seconds)
                seconds = 0
                if life == worker.life and (record := self._take(worker, message)):
                    ended.append(record)
        except queue.Empty:
            pass
        for worker in self._workers:
            worker.end_children_of_the_dead()
        return ended + [worker.give_up() for worker in self._workers if worker.late()]

    def close(self) -> None:
        """Kill the workers at once, with whatever they do."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.reap()
        if self._workers:
            self._logs.cleanup()
        self._workers = []

    def _take(self, worker: _Worker, message: dict[str, Any] | None) -> Record | None:
        if message is None:
            return worker.bury()
        if "record" in message:
            worker.job = None
            return Record.from_json(message["record"])
        if "began" in message:
            worker.began = time.monotonic()
        elif worker.job is not None:
            self._report(worker.job, float(message["share"]), str(message["text"]))
        return None


class _Worker:
    """Hold one slot: its process, which may be replaced, and its job."""

    def __init__(self, work: str, log: Path, inbox: queue.SimpleQueue[Any]) -> None:
        self._work, self._log, self._inbox = work, log, inbox
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self.job: Job | None = None
        self.began: float | None = None
        self.life = 0  # messages of a process that was replaced are known by its number

    def begin(self, job: Job) -> None:
        self.job, self.began = job, None
        if self._process is None or self._process.poll() is not None:
            self.reap()
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job.to_json()) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return  # it died between two jobs; the reader tells, and `bury` makes the record

    def late(self) -> bool:
        limit = self.job.budget.get("seconds") if self.job else None
        return limit is not None and self.began is not None and time.monotonic() - self.began > HARD_LIMIT * limit

    def give_up(self) -> Record:
        self.kill()
        self.reap()
        limit = self.job.budget["seconds"] if self.job else 0.0
        return self._lost(
            Status.OVER_BUDGET,
            f"the job was killed after {HARD_LIMIT:g} times its {limit:g} s: it reported no progress it could end at",
        )

    def bury(self) -> Record | None:
        """Return the record of the job that died with the process, if it had one."""
        self.reap()
        if self.job is None:
            return None
        return self._lost(Status.FAILED, f"the worker process {self._epitaph}{self._last_words()}")

    def kill(self) -> None:
        if self._process is None:
            return
        if os.name == "posix":
            # The group, for what the job has started; gone already if all of it has ended.
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                self._process.kill()
        else:
            self._process.kill()

    def end_children_of_the_dead(self) -> None:
        """Kill what a crashed worker leaves behind: it may hold the pipe open, whose end tells of the crash."""
        if self._process is not None and self._process.poll() is not None:
            self.kill()

    def reap(self) -> None:
        """Wait for the process, which is dead or dying, and close its pipes."""
        if self._process is None:
            return
        process, self._process = self._process, None
        self.life += 1
        if process.stdin is not None:
            # Closing flushes a job nobody is left to read.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        code = process.wait()
        if self._reader is not None:
            self._reader.join()
        self._epitaph = _cause(code)

    def _start(self) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(os.getpid()), self._work],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **dict.fromkeys(_ONE_THREAD, "1"), "PYTHONPATH": path},
                start_new_session=True,
            )
        arguments = (self._process.stdout, self.life)
        self._reader = threading.Thread(target=self._read, args=arguments, name="nervure-reader", daemon=True)
        self._reader.start()

    def _read(self, stream: Any, life: int) -> None:
        # A thread a worker, so that its pipe is always emptied and neither side can wait for the other.
        with stream:
            for line in stream:
                if line.endswith("\n"):
                    self._inbox.put((self, life, json.loads(line)))
        self._inbox.put((self, life, None))

    def _lost(self, status: Status, error: str) -> Record:
        assert self.job is not None
        spent = {} if self.began is None else {"seconds": time.monotonic() - self.began}
        record = Record(
            job=self.job, status=status, error=error, cost=spent, environment={**environment(), "threads": "1"}
        )
        self.job = None
        return record

    def _last_words(self) -> str:
        text = self._log.read_text(errors="replace")[-_LOG_TAIL:].strip()
        return f". Its last words:\n{text}" if text else ""


def _cause(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (", as a system short of memory does" if name == "SIGKILL" else "")


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
