"""The store: an append-only list of Records, and leases on the jobs in flight."""

from __future__ import annotations

import json
import math
import threading
import uuid
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import sqlalchemy as sa

from nervure._kit import StoreError
from nervure.spec import Job, Measurement, Record, Status
from nervure.store import leases
from nervure.store.papers import Papers
from nervure.store.place import connect, default_path, shown, told, writing
from nervure.store.schema import leases as lease_table
from nervure.store.schema import measurements, records
from nervure.store.statements import chunks, insert_new

# Any constant will do, other than that of the migrations: it names the lock under which records are appended.
_WRITERS_LOCK = 7310295
# What a damaged record raises when it is read.
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


class Store:
    """Keep Records. Open one with `Store.open`; it is a context manager.

    A record is never changed, and never deleted but by `nervure.store.prune`. A job has at most one record that is
    done; a job that failed may be tried again, and queries then give its newest record.

    Args:
        engine: The engine of a database at the newest revision.
        silence: Seconds after which a lease that is not renewed is dead. The store renews its own from a thread.

    Examples:
        >>> import tempfile
        >>> from nervure.spec import Job, Record, Status
        >>> job = Job(target="claim:snip/keeps-accuracy", arm="*", case="lenet", seed=0)
        >>> with tempfile.TemporaryDirectory() as folder, Store.open(f"{folder}/store.db") as store:
        ...     store.add(Record(job=job, status=Status.DONE))
        ...     store.add(Record(job=job, status=Status.DONE))
        ...     len(store.records(target=job.target))
        True
        False
        1
    """

    def __init__(self, engine: sa.Engine, *, silence: float = leases.SILENCE) -> None:
        self._engine, self._silence = engine, silence
        self._owner = uuid.uuid4().hex
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None
        # The thread does not know the store, so that one nobody closed ends with its last reference.
        self._finalize = weakref.finalize(self, self._stop.set)

    @classmethod
    def open(cls, where: str | Path | None = None) -> Store:
        """Open a store; create it, or bring an older one to the newest schema, if need be.

        Args:
            where: A path or an SQLAlchemy URL (``sqlite:///...``, ``postgresql://...``); by default
                ``$NERVURE_STORE``, else a file in the user's data directory.

        Returns:
            The store.
        """
        return cls(connect(default_path() if where is None else where))

    @property
    def papers(self) -> Papers:
        """Return the papers that feeds told of, with subscriptions and the state of each feed."""
        return Papers(self._engine)

    def targets(self) -> list[str]:
        """Return every target that has a record."""
        query = sa.select(records.c.target).distinct().order_by(records.c.target)
        with told(self._engine.url), self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def add(self, record: Record) -> bool:
        """Append a record and give its job's lease back.

        Args:
            record: The record.

        Returns:
            False if a record of this job is already done and this one, also done, was not needed.

        Raises:
            StoreError: If a name in it cannot be written.
        """
        job = record.job
        names = (
            job.target,
            job.arm,
            job.case,
            *(name for one in record.measurements for name in (one.arm, one.metric)),
        )
        if wrong := next((name for name in names if not _writable(name)), None):
            raise StoreError("a name holds a character that databases do not take", found=ascii(wrong))
        row = {
            "job_id": job.id,
            "target": job.target,
            "arm": job.arm,
            "case": job.case,
            "seed": job.seed,
            "status": record.status.value,
            "body": _body(record),
        }
        points = [
            {
                "position": position,
                "arm": point.arm,
                "metric": point.metric,
                "value": None if math.isnan(point.value) else float(point.value),
                "step": point.step,
            }
            for position, point in enumerate(record.measurements)
        ]
        with told(self._engine.url), writing(self._engine) as connection:
            new = append(connection, row, points)
            self._release(connection, [job.id])
        return new is not None

    def done(self, job_ids: Iterable[str]) -> set[str]:
        """Return which jobs are done.

        Args:
            job_ids: The jobs' ids.

        Returns:
            Those with a record that is done.
        """
        found: set[str] = set()
        with told(self._engine.url), self._engine.connect() as connection:
            for chunk in chunks(job_ids):
                query = sa.select(records.c.job_id).where(
                    records.c.job_id.in_(chunk), records.c.status == Status.DONE.value
                )
                found.update(connection.execute(query).scalars())
        return found

    def records(
        self, *, target: str | None = None, job_ids: Iterable[str] | None = None, history: bool = False
    ) -> list[Record]:
        """Return records in the order they were written.

        Args:
            target: Only records of this target.
            job_ids: Only records of these jobs.
            history: Return every record; else one a job, the one that is done or the newest.

        Returns:
            The records.
        """
        query = sa.select(records).order_by(records.c.id)
        if target is not None:
            query = query.where(records.c.target == target)
        queries = [query] if job_ids is None else [query.where(records.c.job_id.in_(c)) for c in chunks(job_ids)]
        with told(self._engine.url), self._engine.connect() as connection:
            rows = sorted((row for q in queries for row in connection.execute(q)), key=lambda row: row.id)
            if not history:
                rows = _newest(rows)
            points = _points(connection, [row.id for row in rows])
        return [self._record(row, points.get(row.id, [])) for row in rows]

    def headers(self, *, after: int = 0) -> list[tuple[int, Record]]:
        """Return records without their measurements, for a view that follows what is written.

        Args:
            after: Only records with a greater number. Records appear in the order of their numbers, from however
                many writers, so nothing is missed by who asks for what comes after the last one seen.

        Returns:
            (number, record) in the order of the numbers, every record of every job.
        """
        query = sa.select(records).where(records.c.id > after).order_by(records.c.id)
        with told(self._engine.url), self._engine.connect() as connection:
            return [(row.id, self._record(row, ())) for row in connection.execute(query)]

    def lease(self, job_id: str) -> bool:
        """Take a job for this store's process, unless it is done or another living process has it.

        The lease is kept alive until `release`, `add` or `close`. It falls to others when the process is gone, or when
        it was not renewed for two minutes.

        Args:
            job_id: The job's id.

        Returns:
            Whether the job is this process's now.
        """
        with told(self._engine.url), writing(self._engine) as connection:
            now = sa.select(leases.clock(connection.dialect))
            time = connection.execute(now).scalar_one()
            mine = {"job_id": job_id, "owner": self._owner, "renewed": time, **leases.holder()}
            held = connection.execute(lease_table.select().where(lease_table.c.job_id == job_id)).one_or_none()
            if held is not None and held.owner != self._owner and leases.dead(held, time, self._silence):
                stale = (lease_table.c.job_id == job_id, lease_table.c.owner == held.owner)
                connection.execute(lease_table.delete().where(*stale, lease_table.c.renewed == held.renewed))
            # Take it first and look for a done record after: one that was added in between is then seen.
            taken = connection.execute(
                insert_new(connection, lease_table).values(mine).returning(lease_table.c.job_id)
            ).scalar()
            already = held is not None and held.owner == self._owner
            finished = sa.select(records.c.id).where(records.c.job_id == job_id, records.c.status == Status.DONE.value)
            if connection.execute(finished).first() is not None:
                self._release(connection, [job_id])
                return False
        if taken is None and not already:
            return False
        if self._beat is None:
            arguments = (self._engine, self._owner, self._stop, self._silence)
            self._beat = threading.Thread(
                target=leases.renew_forever, args=arguments, name="nervure-leases", daemon=True
            )
            self._beat.start()
        return True

    def release(self, job_ids: Iterable[str]) -> None:
        """Give leases back.

        Args:
            job_ids: The jobs' ids; those this process has no lease on are left alone.
        """
        with told(self._engine.url), writing(self._engine) as connection:
            self._release(connection, job_ids)

    def close(self) -> None:
        """Give all leases back and close the connections. A closed store may be closed again."""
        if not self._finalize.alive:
            return
        self._finalize()
        try:
            if self._beat is not None:
                self._beat.join()
                with told(self._engine.url), writing(self._engine) as connection:
                    connection.execute(lease_table.delete().where(lease_table.c.owner == self._owner))
        finally:
            self._engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _release(self, connection: sa.Connection, job_ids: Iterable[str]) -> None:
        for chunk in chunks(job_ids):
            mine = (lease_table.c.owner == self._owner, lease_table.c.job_id.in_(chunk))
            connection.execute(lease_table.delete().where(*mine))

    def _record(self, row: Any, points: Sequence[Measurement]) -> Record:
        try:
            return read(row, points)
        except UNREADABLE as error:
            raise StoreError(
                f"record {row.id} of the store cannot be read",
                found=f"{error!r} ({shown(self._engine.url)})",
                try_="put a copy back; nervure store check tells what else is wrong",
            ) from error


def read(row: Any, points: Sequence[Measurement]) -> Record:
    """Return the record of a row; raises one of `UNREADABLE` if it is damaged.

    Args:
        row: A row of the table of records.
        points: Its measurements.

    Returns:
        The record.
    """
    body = json.loads(row.body)
    return Record(
        job=Job.from_json(body["job"]),
        status=Status(row.status),
        measurements=tuple(points),
        cost=body["cost"],
        warnings=tuple(body["warnings"]),
        error=body["error"],
        environment=body["environment"],
        started=body["started"],
    )


def append(connection: sa.Connection, row: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> int | None:
    """Write a record and its measurements, unless its job is done already and it is done too.

    Args:
        connection: A connection in a writing transaction.
        row: The values of the record, without a number.
        points: The values of its measurements, without the record's number.

    Returns:
        The record's number, or None.
    """
    if connection.dialect.name == "postgresql":
        # Writers take turns until they commit, as in SQLite: a smaller number never appears after a greater one.
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITERS_LOCK)))
    new = connection.execute(insert_new(connection, records).values(row).returning(records.c.id)).scalar()
    if new is not None and points:
        connection.execute(measurements.insert(), [{"record_id": new, **point} for point in points])
    return new


def _writable(name: str) -> bool:
    """Say whether both databases take a text: no zero byte, no half of a surrogate pair."""
    return "\0" not in name and not any("\ud800" <= character <= "\udfff" for character in name)


def _body(record: Record) -> str:
    value = record.to_json()
    return json.dumps({name: value[name] for name in ("job", "cost", "warnings", "error", "environment", "started")})


def _newest(rows: Sequence[Any]) -> list[Any]:
    kept: dict[str, Any] = {}
    for row in rows:
        if row.job_id not in kept or kept[row.job_id].status != Status.DONE.value:
            kept[row.job_id] = row
    return sorted(kept.values(), key=lambda row: int(row.id))


def _points(connection: sa.Connection, record_ids: Sequence[int]) -> dict[int, list[Measurement]]:
    points: dict[int, list[Measurement]] = {}
    for chunk in chunks(record_ids):
        query = measurements.select().where(measurements.c.record_id.in_(chunk)).order_by(*measurements.primary_key)
        for row in connection.execute(query):
            value = math.nan if row.value is None else row.value
            points.setdefault(row.record_id, []).append(
                Measurement(arm=row.arm, metric=row.metric, value=value, step=row.step)
            )
    return points
