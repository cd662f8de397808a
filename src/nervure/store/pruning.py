"""Remove from a store what nobody reads any more, when asked to."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from nervure._kit import UsageError
from nervure.spec import Status
from nervure.store import leases, schema
from nervure.store.place import told, writing
from nervure.store.schema import measurements, records
from nervure.store.statements import CHUNK, chunks

OnProgress = Callable[[float, str], None]
Kind = Literal["failed", "rehearsals", "curves", "leases"]
_DAY = 86400.0
# What a row takes beside its texts: numbers, headers, entries in indexes.
_RECORD_BYTES, _POINT_BYTES, _LEASE_BYTES = 150, 45, 200


@dataclass(frozen=True)
class Part:
    """Say what one kind amounts to.

    Args:
        kind: ``"failed"``: attempts at jobs that are done since; ``"rehearsals"``: what ran with ``--quick``;
            ``"curves"``: points of curves, the final values stay; ``"leases"`` of processes that ended without giving
            them back.
        rows: How many rows go: records, points or leases.
        points: How many measurements go with them.
        size: An estimate of their bytes.
    """

    kind: Kind
    rows: int
    points: int
    size: int


@dataclass(frozen=True)
class Pruned:
    """Say what was removed, or would be.

    Args:
        parts: The kinds that were asked for. What is of two kinds counts with the first.
        freed: By how many bytes the file became smaller; None for PostgreSQL, which uses the space again by itself,
            and where nothing was removed.
    """

    parts: tuple[Part, ...]
    freed: int | None


def prune(
    engine: sa.Engine,
    *,
    failed: bool = False,
    rehearsals: bool = False,
    curves_older_than: float | None = None,
    leases: bool = False,
    dry_run: bool = False,
    progress: OnProgress = lambda share, text: None,
) -> Pruned:
    """Remove records, points of curves or leases, and give the space back.

    While a job is in flight the rehearsals of the last day stay: a run that goes on may be waiting to read them.

    Args:
        engine: A store at the newest revision.
        failed: Remove attempts that failed at jobs that are done since.
        rehearsals: Remove what ran with ``--quick``.
        curves_older_than: Remove points of curves of records that began so many days ago or earlier, at least 0.
        leases: Remove leases of processes that ended without giving them back.
        dry_run: Only look.
        progress: Called with the share that is done and a line of text.

    Returns:
        What went, or would go.

    Raises:
        UsageError: If the age is no number of days.
    """
    if curves_older_than is not None and not (math.isfinite(curves_older_than) and curves_older_than >= 0):
        raise UsageError("the age is no number of days", expected="0 or more", found=curves_older_than)
    with told(engine.url):
        progress(0.0, "looking")
        numbers, dead = _find(engine, failed, rehearsals, curves_older_than)
        parts = [_part(engine, kind, found) for kind, found in numbers.items()]
        if leases:
            parts.append(Part("leases", len(dead), 0, _LEASE_BYTES * len(dead)))
        if dry_run or not any(part.rows for part in parts):
            return Pruned(tuple(parts), None)
        before = _size(engine)
        total, done = sum(map(len, numbers.values())), 0
        for kind, found in numbers.items():
            for chunk in chunks(found):
                _remove(engine, kind, chunk)
                done += len(chunk)
                progress(0.9 * done / max(1, total), f"removing {kind}")
        if leases:
            _remove_leases(engine, dead)
        progress(0.9, "giving the space back")
        _vacuum(engine)
        after = _size(engine)
    progress(1.0, "done")
    return Pruned(tuple(parts), None if before is None or after is None else before - after)


def _find(
    engine: sa.Engine, failed: bool, rehearsals: bool, days: float | None
) -> tuple[dict[Kind, list[int]], list[Any]]:
    """Return the numbers of the records of each kind that is asked for, and the leases that are dead."""
    found: dict[Kind, list[int]] = {}
    with engine.connect() as connection:
        now = connection.execute(sa.select(leases.clock(connection.dialect))).scalar_one()
        held = connection.execute(schema.leases.select()).all()
        dead = [lease for lease in held if leases.dead(lease, now, leases.SILENCE)]
        if failed:
            found["failed"] = list(connection.execute(_superseded()).scalars())
        if not rehearsals and days is None:
            return found, dead
        gone = set(found.get("failed", ()))
        spared = time.time() - _DAY if len(dead) < len(held) else math.inf
        quick, old = [], []
        bodies = sa.select(records.c.id, records.c.body).order_by(records.c.id)
        for number, body in connection.execution_options(yield_per=CHUNK).execute(bodies):
            if number in gone:
                continue
            is_quick, started = _facts(body)
            if rehearsals and is_quick and started <= spared:
                quick.append(number)
            elif days is not None and started <= time.time() - days * _DAY:
                old.append(number)
    if rehearsals:
        found["rehearsals"] = quick
    if days is not None:
        found["curves"] = old
    return found, dead


def _superseded() -> Any:
    done = records.alias()
    is_done = sa.exists().where(done.c.job_id == records.c.job_id, done.c.status == Status.DONE.value)
    return sa.select(records.c.id).where(records.c.status != Status.DONE.value, is_done).order_by(records.c.id)


def _facts(body: str) -> tuple[bool, float]:
    """Say whether a record is of a rehearsal, and when it began; one that does not say when is of no age."""
    try:
        value = json.loads(body)
        quick = value["job"]["params"].get("quick") is True
        started = value["started"]
    except (ValueError, KeyError, TypeError, AttributeError):
        # What cannot be understood is not removed either; `check` names it.
        return False, math.inf
    try:
        moment = datetime.datetime.fromisoformat(started)
    except (ValueError, TypeError):
        return quick, math.inf
    # Times are written in UTC, also where they do not say so.
    return quick, moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp()


def _part(engine: sa.Engine, kind: Kind, numbers: Sequence[int]) -> Part:
    """Count what goes with these records, and estimate its size."""
    rows = points = size = 0
    with engine.connect() as connection:
        for chunk in chunks(numbers):
            count, length = connection.execute(_lengths(measurements, ("arm", "metric"), _points(kind, chunk))).one()
            points += count
            size += count * _POINT_BYTES + int(length)
            if kind != "curves":
                texts = ("job_id", "job_id", "target", "target", "arm", "case", "status", "body")
                count, length = connection.execute(_lengths(records, texts, records.c.id.in_(chunk))).one()
                rows += count
                size += count * _RECORD_BYTES + int(length)
    return Part(kind, points if kind == "curves" else rows, points, size)


def _lengths(table: sa.Table, texts: Collection[str], which: sa.ColumnElement[bool]) -> Any:
    total = sa.func.coalesce(sa.func.sum(sum((sa.func.length(table.c[name]) for name in texts), sa.literal(0))), 0)
    return sa.select(sa.func.count(), total).select_from(table).where(which)


def _points(kind: Kind, numbers: Sequence[int]) -> sa.ColumnElement[bool]:
    belong = measurements.c.record_id.in_(numbers)
    return sa.and_(belong, measurements.c.step.is_not(None)) if kind == "curves" else belong


def _remove(engine: sa.Engine, kind: Kind, numbers: Sequence[int]) -> None:
    with writing(engine) as connection:
        connection.execute(measurements.delete().where(_points(kind, numbers)))
        if kind != "curves":
            connection.execute(records.delete().where(records.c.id.in_(numbers)))


def _remove_leases(engine: sa.Engine, dead: Sequence[Any]) -> None:
    table = schema.leases
    with writing(engine) as connection:
        for lease in dead:
            # One that was taken over or renewed since is another's.
            same = (table.c[name] == lease._mapping[name] for name in ("job_id", "owner", "renewed"))
            connection.execute(table.delete().where(*same))


def _vacuum(engine: sa.Engine) -> None:
    if engine.dialect.name != "sqlite":
        return
    raw = engine.raw_connection()
    try:
        # The driver is in autocommit: VACUUM must not stand in a transaction.
        raw.cursor().execute("VACUUM").close()
        raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
    finally:
        raw.close()


def _size(engine: sa.Engine) -> int | None:
    if engine.dialect.name != "sqlite":
        return None
    files = [Path(f"{engine.url.database}{ending}") for ending in ("", "-wal")]
    return sum(file.stat().st_size for file in files if file.exists())
