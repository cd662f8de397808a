"""Run jobs as tasks of a Ray cluster; the driver alone writes what comes back."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from nervure._kit import CouldNotRun, UsageError, require
from nervure.run.attempt import HARD_LIMIT, environment
from nervure.run.node import Mailbox, code_version, serve
from nervure.run.resources import GIB, Resources
from nervure.spec import Job, Record, Status

Report = Callable[[Job, float, str], None]
MOST_RETRIES = 2
_CONNECT_SECONDS = 10.0
_LOOK_SECONDS = 2.0
# A node may be on its way, replaced or restarted; longer than this nobody waits for one.
NODE_SECONDS = 60.0
_CLOSE_SECONDS = 5.0


@dataclass
class _Try:
    """Hold a job under way: its task, and what became of earlier ones."""

    job: Job
    lost: list[str] = field(default_factory=list)
    task: Any = None
    began: float | None = None

    @property
    def key(self) -> str:
        return f"{self.job.id}/{len(self.lost)}"

    def late(self) -> bool:
        limit = self.job.budget.get("seconds")
        return limit is not None and self.began is not None and time.monotonic() - self.began > HARD_LIMIT * limit


class Ray:
    """Run jobs as tasks of a Ray cluster.

    Jobs and records cross as JSON text. A node whose nervure differs from the driver's ends the run; a job whose
    worker or node is lost is done again, at most twice, and its record says so; a job that fails by itself is not.

    Args:
        address: ``host:port`` of the cluster this machine belongs to, or ``ray://host:port`` of another; None takes
            ``$RAY_ADDRESS``, the cluster started on this machine, or starts one that ends with the run.
        slots: Jobs under way at most; None for as many as the nodes hold, which is looked up again and again.
        resources: What one job gets.

    Raises:
        UsageError: If the address is none, or there is no slot.
    """

    def __init__(
        self, address: str | None = None, *, slots: int | None = None, resources: Resources | None = None
    ) -> None:
        if slots is not None and slots < 1:
            raise UsageError("there must be a worker", expected="at least 1", found=slots)
        if address is not None:
            _host_and_port(address)
        self._address, self._most, self._resources = address, slots, resources or Resources()
        self._ray: Any = None
        self._ours = False
        self._tries: dict[str, _Try] = {}
        self._mailbox: Any = None
        self._held, self._looked, self._seen = 0, 0.0, 0.0

    @property
    def slots(self) -> int:
        """Return how many jobs may be under way; at least 1, for a node may come back."""
        return max(1, min(self._held, self._most or self._held))

    def open(self, work: str, report: Report) -> None:
        """Connect, and see that a node holds a job.

        Args:
            work: Name of the work function, importable on the nodes.
            report: Called with (job, share done, text).

        Raises:
            CouldNotRun: If there is no cluster, or none of its nodes holds a job.
        """
        self._work, self._report, self._version = work, report, code_version()
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._ray = require("ray", extra="ray")
        options = self._resources
        if not self._ray.is_initialized():
            self._connect()
        self._look()
        if not self._held:
            raise CouldNotRun("no node of the cluster holds a job", expected=f"{options} on one", found=self._largest())
        with self._reached():
            self._task = self._ray.remote(serve).options(
                name="nervure",
                num_cpus=options.cpus,
                num_gpus=options.gpus,
                memory=None if options.memory is None else int(options.memory * GIB),
                max_retries=0,  # here they are counted, and told
            )
            self._mailbox = self._ray.remote(Mailbox).options(num_cpus=0, max_restarts=-1).remote()
        self._listen()

    def submit(self, job: Job) -> None:
        """Give a job to the cluster.

        Args:
            job: The job.
        """
        self._tries[job.id] = _Try(job)
        self._begin(self._tries[job.id])

    def wait(self, seconds: float) -> list[Record]:
        """Wait for tasks, report progress, do lost jobs again, and end tasks far beyond their job's time.

        Args:
            seconds: How long to wait at most for the first message.

        Returns:
            The records of the jobs that ended.

        Raises:
            CouldNotRun: If a node's code is not the driver's, or no node has been left that holds a job.
        """
        ended: list[Record] = []
        try:
            while True:
                key, future = self._inbox.get(timeout=seconds)
                seconds = 0
                if not key:
                    self._read(future)
                elif record := self._take(key, future):
                    ended.append(record)
        except queue.Empty:
            pass
        ended += [self._give_up(one) for one in list(self._tries.values()) if one.late()]
        # Not while there are records to hand over: an error would lose them.
        if not ended and time.monotonic() - self._looked > _LOOK_SECONDS:
            self._look()
            if time.monotonic() - self._seen > NODE_SECONDS:
                raise CouldNotRun(
                    f"no node that holds a job has been there for {NODE_SECONDS:g} s",
                    expected=f"{self._resources} on one",
                    found=self._largest(),
                    try_="starting again when there is one: what has ended is stored",
                )
        return ended

    def close(self) -> None:
        """End all tasks at once, and leave the cluster if this executor joined it."""
        if self._ray is None or not self._ray.is_initialized():
            return
        tasks = [one.task for one in self._tries.values() if one.task is not None]
        self._tries = {}
        # The cluster may be what has gone, and all that ran on it.
        with contextlib.suppress(self._ray.exceptions.RayError, ConnectionError):
            for task in tasks:
                self._ray.cancel(task, force=True)
            if self._mailbox is not None:
                self._ray.kill(self._mailbox)
            if tasks:
                self._ray.wait(tasks, num_returns=len(tasks), timeout=_CLOSE_SECONDS)
        self._mailbox = None
        if self._ours:
            self._ours = False
            leave(self._ray)

    def _connect(self) -> None:
        self._ours = True
        connect(self._ray, self._address)

    def _begin(self, one: _Try) -> None:
        one.began = None
        text, key = json.dumps(one.job.to_json()), one.key
        with self._reached():
            one.task = self._task.remote(
                text, self._work, self._version, os.getcwd(), import_paths(), key, self._mailbox
            )
            self._expect(key, one.task)

    def _expect(self, key: str, task: Any) -> None:
        inbox = self._inbox
        task.future().add_done_callback(lambda future: inbox.put((key, future)))

    def _listen(self) -> None:
        self._expect("", self._mailbox.take.remote())

    def _read(self, future: Any) -> None:
        if future.exception() is None:
            now = {one.key: one for one in self._tries.values()}
            for key, (share, text) in future.result().items():
                if key in now:
                    now[key].began = now[key].began or time.monotonic()
                    self._report(now[key].job, float(share), str(text))
        elif isinstance(future.exception(), self._ray.exceptions.ActorDiedError):
            return  # for good: only progress is lost
        self._listen()

    def _take(self, key: str, future: Any) -> Record | None:
        one = self._tries.get(key.partition("/")[0])
        if one is None or one.key != key:
            return None  # it was given up
        if (error := future.exception()) is not None:
            return self._fail(one, error)
        reply = json.loads(future.result())
        if "refused" in reply:
            raise CouldNotRun(
                "a node runs other code than this process",
                expected=self._version,
                found=reply["refused"],
                try_="installing one version everywhere; what has ended is stored",
            )
        del self._tries[one.job.id]
        record = Record.from_json(reply["record"])
        return record.replace(warnings=(*self._told(one), *record.warnings))

    def _fail(self, one: _Try, error: BaseException) -> Record | None:
        # A lost job is begun again; of any other the record says what became of it.
        known = self._ray.exceptions
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, ImportError) or "failed to import" in str(cause):
            raise CouldNotRun(
                "a node cannot import nervure", expected=self._version, found=error_lines(cause)[-1]
            ) from error
        lost = (
            known.WorkerCrashedError,
            known.NodeDiedError,
            known.LocalRayletDiedError,
            known.ObjectLostError,
            known.OutOfMemoryError,
        )
        text = f"{type(error).__name__}: {error_lines(error)[0]}"
        if not isinstance(error, lost):
            return self._without(one, Status.FAILED, text)
        one.lost.append(text)
        if len(one.lost) <= MOST_RETRIES:
            self._begin(one)
            return None
        return self._without(one, Status.FAILED, f"lost {len(one.lost)} times, with its worker or node. {text}")

    def _give_up(self, one: _Try) -> Record:
        with self._reached():
            self._ray.cancel(one.task, force=True)
        limit = one.job.budget["seconds"]
        return self._without(
            one,
            Status.OVER_BUDGET,
            f"the job was killed after {HARD_LIMIT:g} times its {limit:g} s: it reported no progress it could end at",
        )

    def _without(self, one: _Try, status: Status, error: str) -> Record:
        """Return the record of a job that cannot tell of itself any more."""
        del self._tries[one.job.id]
        spent = {} if one.began is None else {"seconds": time.monotonic() - one.began}
        where = {name: text for name, text in environment().items() if name not in ("cpu", "system", "threads")}
        return Record(job=one.job, status=status, error=error, cost=spent, warnings=self._told(one), environment=where)

    def _told(self, one: _Try) -> tuple[str, ...]:
        return tuple(f"begun again, for its worker or node was lost: {text}" for text in one.lost[:MOST_RETRIES])

    def _look(self) -> None:
        """Count how many jobs the nodes hold."""
        self._looked = time.monotonic()
        self._held = sum(self._resources.fit(node["Resources"]) for node in self._nodes())
        if self._held:
            self._seen = self._looked

    def _nodes(self) -> list[dict[str, Any]]:
        with self._reached():
            return [node for node in self._ray.nodes() if node["Alive"]]

    def _largest(self) -> str:
        kinds = {
            f"{have.get('CPU', 0):g} CPU, {have.get('GPU', 0):g} GPU, {have.get('memory', 0) / GIB:.1f} GiB"
            for have in (node["Resources"] for node in self._nodes())
        }
        return "nodes of " + "; ".join(sorted(kinds)) if kinds else "no node"

    def _reached(self) -> AbstractContextManager[None]:
        return reached(self._ray)


@contextmanager
def reached(ray: Any, *also: type[Exception]) -> Iterator[None]:
    """Tell a cluster that does not answer in one sentence.

    Args:
        ray: The package.
        *also: Further exceptions that mean the same here.

    Yields:
        Nothing.

    Raises:
        CouldNotRun: In place of Ray's error.
    """
    try:
        yield
    except (ray.exceptions.RayError, ConnectionError, *also) as error:
        text = f"the Ray cluster cannot be reached: {error_lines(error)[-1]}"
        raise CouldNotRun(text, try_="ray status, on one of it") from error


def connect(ray: Any, address: str | None) -> None:
    """Join a cluster, or start one on this machine where there is none and none is named.

    Args:
        ray: The package.
        address: As in `Ray`.

    Raises:
        CouldNotRun: If nothing answers there.
        ConnectionError: Never to the caller: what Ray raises is told by `reached`.
    """
    server = None if address is None else _host_and_port(address)
    if server is not None:
        try:
            socket.create_connection(server, timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            raise CouldNotRun(f"nothing answers at {address}: {error}", try_="ray status, on one of it") from error
    # A cluster of our own tells nobody that it was started.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if server is None:
        options["include_dashboard"] = False
    with reached(ray, RuntimeError, ValueError), _signals_kept():
        try:
            ray.init(address=address, **options)
        except ConnectionError:
            if server is None or not str(address).startswith("ray://"):
                raise
            # The server starts a process for each driver, which on a busy machine may come too late.
            ray.init(address=address, **options)


def leave(ray: Any) -> None:
    """Leave the cluster; one that was started here ends."""
    with _signals_kept():
        ray.shutdown()


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address if "://" in address else f"gcs://{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if (
        host is None
        or port is None
        or parts.scheme not in ("ray", "gcs")
        or parts.path
        or parts.query
        or "@" in address
    ):
        raise UsageError("this is no cluster's address", expected="ray://host:port or host:port", found=address)
    return host, port


def import_paths() -> list[str]:
    """Return where this process imports from, as a node can look for it."""
    return [os.path.abspath(entry or os.getcwd()) for entry in sys.path]


def error_lines(error: BaseException) -> list[str]:
    """Return what an error says, at least one line: Ray's begin with what happened, a traceback ends with it."""
    return [line.strip()[:500] for line in str(error).splitlines() if line.strip()] or [type(error).__name__]


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Put back the handlers that Ray replaces."""
    ours = threading.current_thread() is threading.main_thread()
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)} if ours else {}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
