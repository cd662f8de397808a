"""Look a store through and name what is wrong, without changing it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from nervure._kit import UsageError
from nervure.spec import Measurement, Status
from nervure.store import leases, schema
from nervure.store.place import explain, shown
from nervure.store.schema import measurements, records
from nervure.store.store import UNREADABLE, read

OnProgress = Callable[[float, str], None]
_ERRORS = (sa.exc.DBAPIError, sqlite3.Error)
_PAGE = 200
_MOST_MESSAGES = 10
_MOST_TRIED = 1_000_000


@dataclass(frozen=True)
class Finding:
    """Name one thing that is wrong.

    Args:
        what: What it is, one sentence without the final stop.
        advice: What to do.
    """

    what: str
    advice: str


@dataclass(frozen=True)
class Checked:
    """Say how a store is.

    Args:
        revision: The revision of its schema, or None where it could not be read.
        fine: How many records were read without a fault.
        findings: What is wrong.
    """

    revision: str | None
    fine: int
    findings: tuple[Finding, ...]


def check(engine: sa.Engine, *, progress: OnProgress = lambda share, text: None) -> Checked:
    """Look a store through: the database, its schema, every record, jobs done twice, leases nobody holds.

    Args:
        engine: An engine of `nervure.store.place.bare`, so that an older store is not upgraded by looking at it.
        progress: Called with the share that is done and a line of text.

    Returns:
        What was found.

    Raises:
        UsageError: If the database holds no store.
    """
    looking = _Look(engine, progress)
    progress(0.0, "the database")
    looking.database()
    revision = looking.revision()
    if looking.reachable and revision is None:
        raise UsageError("there is no nervure store", found=shown(engine.url))
    if revision is None or revision > schema.HEAD:
        return Checked(revision, 0, tuple(dict.fromkeys(looking.findings)))
    looking.tables(revision)
    fine = looking.records()
    looking.measurements()
    looking.twice()
    if revision >= "0002":
        looking.leases()
    looking.numbers()
    progress(1.0, "done")
    return Checked(revision, fine, tuple(dict.fromkeys(looking.findings)))


class _Look:
    def __init__(self, engine: sa.Engine, progress: OnProgress) -> None:
        self._engine, self._progress = engine, progress
        self._sqlite = engine.dialect.name == "sqlite"
        self.findings: list[Finding] = []
        self.reachable = True

    def _found(self, what: str, advice: str) -> None:
        self.findings.append(Finding(what, advice))

    def _rows(self, query: Any, what: str) -> list[Any]:
        """Return the rows of a query; one that fails is a finding."""
        try:
            with self._engine.connect() as connection:
                return list(connection.execute(sa.text(query) if isinstance(query, str) else query).all())
        except _ERRORS as error:
            meaning, found, advice = explain(error, self._engine.url)
            self.reachable = False
            self._found(f"{what} cannot be read: {meaning} ({found})", advice)
            return []

    def database(self) -> None:
        if self._sqlite:
            told = self._rows(f"PRAGMA integrity_check({_MOST_MESSAGES})", "the file")
            for row in told:
                for line in str(row[0]).splitlines():
                    if line != "ok":
                        self._found(f"the file is damaged: {line}", f"put a copy back, or save {self._recover()}")
            return
        for row in self._rows("SHOW server_encoding", "the database's encoding"):
            if row[0] != "UTF8":
                advice = "copy the store to a database made by createdb --encoding UTF8 --template template0"
                self._found(f"the database's encoding is {row[0]}, which lacks characters", advice)

    def _recover(self) -> str:
        return f"what is readable: sqlite3 {shown(self._engine.url)} .recover"

    def revision(self) -> str | None:
        try:
            with self._engine.connect() as connection:
                found = schema.revision(connection)
        except _ERRORS:
            self.reachable = False
            self._rows(f"SELECT version_num FROM {schema.VERSION_TABLE}", "the schema's revision")
            return None
        if found is not None and found > schema.HEAD:
            self._found(f"the store is of a newer nervure: schema {found}", "upgrade nervure")
        elif found is not None and found < schema.HEAD:
            self._found(f"the store is of an older nervure: schema {found}", "none needed: any use upgrades it")
        return found

    def tables(self, revision: str) -> None:
        """Compare the tables with the code's; those of an older revision are known by the records alone."""
        expected = schema.metadata.tables.values() if revision == schema.HEAD else (records, measurements)
        advice = "put a copy back, or copy the store into a new one"
        try:
            inspector = sa.inspect(self._engine)
            for table in expected:
                if not inspector.has_table(table.name):
                    self._found(f"the table {table.name} is missing", advice)
                    continue
                there = {column["name"] for column in inspector.get_columns(table.name)}
                for column in table.columns:
                    if column.name not in there:
                        self._found(f"the table {table.name} has no column {column.name}", advice)
            if inspector.has_table(records.name) and "nervure_done_once" not in {
                index["name"] for index in inspector.get_indexes(records.name)
            }:
                self._found("nothing keeps a job from being done twice: an index is missing", advice)
        except _ERRORS as error:
            self._found(f"the tables cannot be listed: {explain(error, self._engine.url)[1]}", advice)

    def records(self) -> int:
        """Read every record and return how many are as they should be."""
        fine = 0
        total = max(
            1, sum(row[0] for row in self._rows(sa.select(sa.func.count()).select_from(records), "the records"))
        )
        for seen, (number, row, problem) in enumerate(self._each(), start=1):
            if seen % _PAGE == 0:
                self._progress(min(0.99, seen / total), f"{seen} records")
            wrong = problem or _wrong(row)
            if wrong is None:
                fine += 1
            else:
                self._found(f"record {number} {wrong}", "put a copy back; every other record can still be read")
        return fine

    def _each(self) -> Iterator[tuple[int, Any, str | None]]:
        """Give every record with its measurements; where a page cannot be read, one at a time.

        Yields:
            The record's number; its row and measurements, or None; why they could not be read, or None.
        """
        for numbers in self._numbers():
            try:
                yield from ((row[0].id, row, None) for row in self._read(numbers))
            except _ERRORS:
                for number in numbers:
                    try:
                        yield from ((number, row, None) for row in self._read([number]))
                    except _ERRORS as error:
                        yield number, None, f"cannot be read: {explain(error, self._engine.url)[1]}"

    def _numbers(self) -> Iterator[Sequence[int]]:
        """Give the numbers of the records, a page at a time; where damage hides them, every number there may be.

        Yields:
            Some numbers, in order.
        """
        after = 0
        while True:
            known = len(self.findings)
            page = sa.select(records.c.id).where(records.c.id > after).order_by(records.c.id).limit(_PAGE)
            numbers = [row[0] for row in self._rows(page, f"the list of records after number {after}")]
            if not numbers:
                break
            after = numbers[-1]
            yield numbers
        if len(self.findings) > known:
            for row in self._rows(sa.select(sa.func.max(records.c.id)), "the greatest number of a record"):
                # A greatest number that is itself damaged must not keep us here for ever.
                end = min(row[0] or 0, after + _MOST_TRIED) + 1
                yield from (range(start, min(start + _PAGE, end)) for start in range(after + 1, end, _PAGE))

    def _read(self, numbers: Sequence[int]) -> list[tuple[Any, list[Any]]]:
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(records).where(records.c.id.in_(numbers)).order_by(records.c.id)).all()
            points: dict[int, list[Any]] = {row.id: [] for row in rows}
            belong = measurements.c.record_id.in_(numbers)
            for point in connection.execute(measurements.select().where(belong).order_by(*measurements.primary_key)):
                points.get(point.record_id, []).append(point)
        return [(row, points[row.id]) for row in rows]

    def measurements(self) -> None:
        joined = measurements.outerjoin(records, measurements.c.record_id == records.c.id)
        lost = sa.select(sa.func.count()).select_from(joined).where(records.c.id.is_(None))
        for row in self._rows(lost, "the measurements"):
            if row[0]:
                self._found(f"{row[0]} measurements belong to no record", "copy the store into a new one, without them")

    def twice(self) -> None:
        done = sa.select(records.c.job_id, sa.func.count()).where(records.c.status == Status.DONE.value)
        for row in self._rows(done.group_by(records.c.job_id).having(sa.func.count() > 1), "the jobs that are done"):
            self._found(f"job {row[0]} is done {row[1]} times", "copy the store into a new one, which takes the first")

    def leases(self) -> None:
        now = [row[0] for row in self._rows(sa.select(leases.clock(self._engine.dialect)), "the database's clock")]
        held = self._rows(schema.leases.select(), "the leases")
        dead = sum(leases.dead(row, now[0], leases.SILENCE) for row in held) if now else 0
        if dead:
            who = "the lease of a job is held by a process" if dead == 1 else f"{dead} leases are held by processes"
            self._found(f"{who} that ended without giving it back", "none needed; nervure store prune --leases")

    def numbers(self) -> None:
        """See that PostgreSQL, after a copy made by hand, does not give numbers that are taken."""
        if self._sqlite:
            return
        sequence = "pg_sequence_last_value(pg_get_serial_sequence('nervure_records', 'id')::regclass)"
        query = f"SELECT max(id), {sequence} FROM nervure_records"
        for greatest, last in self._rows(query, "the numbers of records"):
            if greatest is not None and (last or 0) < greatest:
                advice = f"SELECT setval(pg_get_serial_sequence('nervure_records', 'id'), {greatest}) as the owner"
                self._found(f"new records would get numbers that are taken: {last or 0} of {greatest}", advice)


def _wrong(pair: tuple[Any, list[Any]]) -> str | None:
    """Say what is wrong with a record, if anything."""
    row, points = pair
    try:
        record = read(row, [Measurement(arm=one.arm, metric=one.metric, value=0.0, step=one.step) for one in points])
        job, number = record.job, record.job.id
    except UNREADABLE as error:
        return f"cannot be understood: {error!r}"
    if number != row.job_id:
        return f"says it is of job {row.job_id}, its content says {number}"
    columns = (row.target, row.arm, row.case, row.seed)
    if columns != (job.target, job.arm, job.case, job.seed):
        return f"says {columns}, its content says {(job.target, job.arm, job.case, job.seed)}"
    if any(not isinstance(one.value, float | int | None) for one in points):
        return "has a measurement that is no number"
    return None
