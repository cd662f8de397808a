"""Copy a store into another, of the same or of the other database: resumable, and checked at the end."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from nervure._kit import StoreError, UsageError
from nervure.store import schema
from nervure.store.place import shown, told, writing
from nervure.store.schema import leases, measurements, records
from nervure.store.store import append

OnProgress = Callable[[float, str], None]
_PAGE = 100
_ROWS = 500
# A lease belongs to a process that knows the source alone.
_NOT_AS_THEY_ARE = (records, measurements, leases)


@dataclass(frozen=True)
class Copied:
    """Say what a copy did.

    Args:
        added: How many rows are new, by table; measurements go with their records.
        there: How many were there already, by table. A job that is done in both stores counts here, also where the
            two stores hold different results of it: that of the target stays.
        checksum: Of all records that were copied, now or before, as read back from the target: SHA-256.
    """

    added: Mapping[str, int]
    there: Mapping[str, int]
    checksum: str


def copy(source: sa.Engine, target: sa.Engine, *, progress: OnProgress = lambda share, text: None) -> Copied:
    """Copy every record with its measurements, and every other table but the leases.

    The records keep their order and get new numbers. What is there already is not added again, so a copy that was
    interrupted goes on where it ended. At the end the target is read back and compared.

    Args:
        source: A store at the newest revision; what is added to it meanwhile is left for the next copy.
        target: Another one. It may hold records of its own, and others may write to it.
        progress: Called with the share that is done and a line of text.

    Returns:
        What was done.

    Raises:
        UsageError: If both are one store.
        StoreError: If the target does not hold what was copied, or cannot hold it.
    """
    if shown(source.url) == shown(target.url):
        raise UsageError("a store cannot be copied onto itself", found=shown(source.url))
    last, count = _extent(source)
    behind = _extent(target)[1]
    # Read the target, copy the source, read the target back.
    share = _Share(progress, total=2 * behind + 2 * count)
    free: Counter[bytes] = Counter()
    for _, _, digest in _every(target, share, "reading what is there"):
        free[digest] += 1
    wanted: Counter[bytes] = Counter()
    added = superseded = 0
    for page in _pages(source, last):
        new = []
        for row, points in page:
            digest = _digest(row, points)
            wanted[digest] += 1
            if free[digest]:
                free[digest] -= 1
            else:
                new.append((row, points, digest))
        for digest in _append(target, new):
            wanted[digest] -= 1
            superseded += 1
            added -= 1
        added += len(new)
        share.step(len(page), f"copying, {added} new")
    tables = {table.name: _copy_table(source, target, table) for table in _others()}
    found: Counter[bytes] = Counter()
    for _, _, digest in _every(target, share, "checking"):
        found[digest] += 1
    if missing := wanted - found:
        raise StoreError(
            "the copy is not what the source is",
            expected=f"{wanted.total()} records",
            found=f"{missing.total()} of them missing or different in {shown(target.url)}",
            try_="nervure store check on both stores, then copy again",
        )
    progress(1.0, "done")
    total = wanted.total() + superseded
    return Copied(
        added={records.name: added} | {name: new for name, (new, _) in tables.items()},
        there={records.name: total - added} | {name: old for name, (_, old) in tables.items()},
        checksum=hashlib.sha256(b"".join(sorted((wanted & found).elements()))).hexdigest(),
    )


class _Share:
    """Count what was done of a total that may turn out larger."""

    def __init__(self, progress: OnProgress, *, total: int) -> None:
        self._progress, self._total, self._done = progress, max(1, total), 0

    def step(self, count: int, text: str) -> None:
        self._done += count
        self._progress(min(0.999, self._done / self._total), text)


def _extent(engine: sa.Engine) -> tuple[int, int]:
    """Return the greatest number of a record, and how many there are."""
    with told(engine.url), engine.connect() as connection:
        last, count = connection.execute(sa.select(sa.func.max(records.c.id), sa.func.count())).one()
    return last or 0, count


def _every(engine: sa.Engine, share: _Share, text: str) -> Iterator[tuple[Any, list[Any], bytes]]:
    for page in _pages(engine, None):
        yield from ((row, points, _digest(row, points)) for row, points in page)
        share.step(len(page), text)


def _pages(engine: sa.Engine, last: int | None) -> Iterator[list[tuple[Any, list[Any]]]]:
    """Give the records with their measurements, in order, a page at a time.

    Yields:
        (record, measurements) of each.
    """
    after = 0
    while True:
        query = sa.select(records).where(records.c.id > after).order_by(records.c.id).limit(_PAGE)
        if last is not None:
            query = query.where(records.c.id <= last)
        with told(engine.url), engine.connect() as connection:
            rows = connection.execute(query).all()
            if not rows:
                return
            after = rows[-1].id
            points: dict[int, list[Any]] = {row.id: [] for row in rows}
            belong = measurements.c.record_id.between(rows[0].id, after)
            for point in connection.execute(measurements.select().where(belong).order_by(*measurements.primary_key)):
                # One without a record, which a damaged store may hold, is left behind; `check` names it.
                points.get(point.record_id, []).append(point)
        yield [(row, points[row.id]) for row in rows]


def _digest(row: Any, points: Iterable[Any]) -> bytes:
    """Return what tells a record from others: its content without its number."""
    values = [[point.arm, point.metric, _number(point.value), _number(point.step)] for point in points]
    content = [row.job_id, row.target, row.arm, row.case, row.seed, row.status, row.body, values]
    return hashlib.sha256(json.dumps(content).encode()).digest()


def _number(value: float | None) -> float | None:
    # SQLite has no NaN and no sign of zero.
    return None if value is None or math.isnan(value) else float(value) + 0.0


def _append(target: sa.Engine, new: Sequence[tuple[Any, list[Any], bytes]]) -> list[bytes]:
    """Write records, all or none, and return those that were not needed: their job is done in the target."""
    spared: list[bytes] = []
    if not new:
        return spared
    with told(target.url), writing(target) as connection:
        for row, points, digest in new:
            values = {name: value for name, value in row._mapping.items() if name != "id"}
            rows = [{name: value for name, value in one._mapping.items() if name != "record_id"} for one in points]
            _refuse_zero_bytes(target, f"record {row.id}", [values, *rows])
            if append(connection, values, rows) is None:
                spared.append(digest)
    return spared


def _others() -> list[sa.Table]:
    return [table for table in schema.metadata.sorted_tables if table not in _NOT_AS_THEY_ARE]


def _copy_table(source: sa.Engine, target: sa.Engine, table: sa.Table) -> tuple[int, int]:
    """Copy the rows whose keys the target does not have; return how many are new, and how many were there.

    Raises:
        StoreError: If a key is missing at the end.
    """
    insert = sqlite.insert if target.dialect.name == "sqlite" else postgresql.insert
    keys: set[tuple[Any, ...]] = set()
    added = 0
    with told(source.url), source.connect() as reading:
        every = reading.execution_options(yield_per=_ROWS).execute(table.select().order_by(*table.primary_key))
        for rows in every.partitions():
            values = [dict(row._mapping) for row in rows]
            _refuse_zero_bytes(target, f"a row of {table.name}", values)
            keys.update(tuple(one[column.name] for column in table.primary_key) for one in values)
            with told(target.url), writing(target) as connection:
                statement = insert(table).values(values).on_conflict_do_nothing().returning(*table.primary_key)
                added += len(connection.execute(statement).all())
    with told(target.url), writing(target) as connection:
        _set_sequence(connection, table)
        missing = keys - {tuple(row) for row in connection.execute(sa.select(*table.primary_key))}
    if missing:
        raise StoreError(f"the copy lacks rows of {table.name}", found=f"{len(missing)} missing", try_="copying again")
    return added, len(keys) - added


def _set_sequence(connection: sa.Connection, table: sa.Table) -> None:
    """Let PostgreSQL go on counting after the numbers that were copied."""
    counted = table.autoincrement_column
    if connection.dialect.name != "postgresql" or counted is None:
        return
    sequence = sa.func.pg_get_serial_sequence(table.name, counted.name)
    greatest = connection.execute(sa.select(sa.func.max(counted))).scalar()
    if greatest is not None:
        following = connection.execute(sa.select(sa.func.nextval(sequence))).scalar_one()
        connection.execute(sa.select(sa.func.setval(sequence, max(greatest, following))))


def _refuse_zero_bytes(target: sa.Engine, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    if target.dialect.name != "postgresql":
        return
    for row in rows:
        for column, value in row.items():
            if isinstance(value, str) and "\0" in value:
                raise StoreError(
                    f"{name} cannot be copied: its {column} has a zero byte, which PostgreSQL does not take",
                    found=ascii(value)[:80],
                    try_="copying into a file instead",
                )
