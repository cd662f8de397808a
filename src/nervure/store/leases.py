"""Leases: a job in flight belongs to one process, until it ends, dies or falls silent."""

from __future__ import annotations

import os
import socket
import threading
import uuid
from pathlib import Path

import sqlalchemy as sa

from nervure.store.place import writing
from nervure.store.schema import leases

SILENCE = 120.0
HAS_PROC = Path("/proc/self/stat").exists()


def renew_forever(engine: sa.Engine, owner: str, stop: threading.Event, silence: float) -> None:
    """Renew all leases of an owner four times within the time after which they would expire.

    Args:
        engine: The store's engine.
        owner: The owner.
        stop: Set to end.
        silence: Seconds after which a lease that was not renewed is dead.
    """
    while not stop.wait(silence / 4):
        try:
            with writing(engine) as connection:
                # A row that another transaction is giving back is skipped: to wait for it could be a deadlock.
                mine = sa.select(leases.c.job_id).where(leases.c.owner == owner).with_for_update(skip_locked=True)
                renewed = leases.update().where(leases.c.job_id.in_(mine), leases.c.owner == owner)
                connection.execute(renewed.values(renewed=clock(connection.dialect)))
        except sa.exc.DBAPIError:
            # A missed beat is made up by the next. If none succeeds the leases expire, as they should.
            continue


def clock(dialect: sa.Dialect) -> sa.ColumnElement[float]:
    """Return the database's own time in seconds: machines that share a store may disagree about theirs.

    Args:
        dialect: The database's dialect.

    Returns:
        The expression.
    """
    if dialect.name == "sqlite":
        return sa.literal_column("((julianday('now') - 2440587.5) * 86400.0)", sa.Double)
    return sa.literal_column("extract(epoch from clock_timestamp())::double precision", sa.Double)


def holder() -> dict[str, object]:
    """Describe this process so that others can tell whether it still lives.

    Returns:
        ``machine``, ``pid`` and ``born``, as the table has them.
    """
    return {"machine": machine(), "pid": os.getpid(), "born": born(os.getpid()) or ""}


def dead(lease: sa.Row[tuple[object, ...]], now: float, silence: float) -> bool:
    """Say whether a lease may be taken over.

    Args:
        lease: The row.
        now: The database's time.
        silence: Seconds after which a lease that was not renewed is dead.

    Returns:
        Whether its process is gone from this machine, or has not renewed it in time.
    """
    row = lease._mapping
    if now - row["renewed"] > silence:
        return True
    return row["machine"] == machine() and born(row["pid"]) != row["born"]


def born(pid: int) -> str | None:
    """Return what tells a process from a later one with the same number.

    Args:
        pid: The process.

    Returns:
        Its start time on Linux, the empty text where the system does not tell, None if there is no such process.
    """
    if HAS_PROC:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The name, in parentheses, may hold spaces; after it come the state and, nineteen fields on, the start time.
        state, *rest = stat[stat.rindex(")") + 2 :].split()
        return None if state in "ZX" else rest[18]
    if os.name == "posix":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return ""
    return ""


def machine() -> str:
    """Return a name of the space in which process numbers have a meaning: machine, boot and container.

    Returns:
        The name.
    """
    if HAS_PROC:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {uuid.getnode()}"
