"""Where a store is, how it is connected to, and what its database's errors mean."""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from nervure._kit import StoreError, UsageError, require
from nervure.store import schema

BUSY_SECONDS = 30.0


def default_path() -> Path:
    """Return where the store is when nobody says otherwise.

    Returns:
        ``$NERVURE_STORE``, or ``nervure/store.db`` in the user's data directory.
    """
    if named := os.environ.get("NERVURE_STORE"):
        return Path(named)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "nervure" / "store.db"


def connect(where: str | Path) -> sa.Engine:
    """Return an engine on a store that is at the newest revision; create or upgrade it if need be.

    Args:
        where: A path, or an SQLAlchemy URL.

    Returns:
        The engine.

    Raises:
        UsageError: If it is neither a path nor a URL of SQLite or PostgreSQL.
    """
    url = _url(where)
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise UsageError("the store cannot live there", expected="a file, sqlite:// or postgresql://", found=url)
    if url.drivername == "postgresql+psycopg":
        require("psycopg", extra="postgres")
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS} if url.drivername == "sqlite" else {})
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _on_connect)
        event.listen(engine, "begin", _on_begin)
    try:
        with told(engine.url):
            with engine.connect() as connection:
                if schema.revision(connection) == schema.HEAD:
                    return engine
            with writing(engine) as connection:
                schema.upgrade(connection)
    except BaseException:
        engine.dispose()
        raise
    return engine


def writing(engine: sa.Engine) -> Any:
    """Begin a transaction that takes SQLite's write lock at once, so that it cannot fail half-way.

    Args:
        engine: The engine.

    Returns:
        A context manager that gives the connection, commits at its end and rolls back on an exception.
    """
    return engine.execution_options(nervure_writes=True).begin()


@contextmanager
def told(url: sa.URL) -> Iterator[None]:
    """Turn the database's errors into one paragraph with a next step.

    Args:
        url: Where the store is.

    Yields:
        Nothing.

    Raises:
        StoreError: In place of the database's error.
    """
    try:
        yield
    except (sa.exc.DBAPIError, sqlite3.Error, OSError) as error:
        what, found, advice = _explain(error, url)
        raise StoreError(what, found=found, try_=advice) from error


def _url(where: str | Path) -> sa.URL:
    if isinstance(where, str) and "://" in where:
        try:
            url = sa.make_url(where)
        except sa.exc.ArgumentError as error:
            raise UsageError("the store's address is no URL", expected="for example sqlite:///runs.db") from error
        if url.drivername in ("postgres", "postgresql"):
            url = url.set(drivername="postgresql+psycopg")
    else:
        path = Path(where).expanduser().absolute()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the store's folder {path.parent} cannot be made: {error.strerror}") from error
        url = sa.URL.create("sqlite", database=str(path))
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise UsageError("a store in memory would be lost at the end", expected="a file")
    return url


def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
    # The driver's own transaction handling commits behind our back before DDL; _on_begin begins instead.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    # A record that was acknowledged survives a power failure too. Records are few; the sync costs nothing.
    cursor.execute("PRAGMA synchronous = FULL")
    if cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        _set_wal(cursor)
    cursor.close()


def _set_wal(cursor: sqlite3.Cursor) -> None:
    """Switch to WAL; two processes that create one store together must take turns, which SQLite does not wait for.

    Raises:
        OperationalError: If another process keeps the file locked, or it may not be written.
    """
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname not in ("SQLITE_BUSY", "SQLITE_LOCKED") or time.monotonic() > end:
                raise
        time.sleep(0.02)


def _on_begin(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("nervure_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


# By the beginning of SQLite's name of the error: what happened, and what to do.
_MEANING = (
    ("SQLITE_FULL", "the disk is full", "free some space and start again; what is stored is kept"),
    ("SQLITE_IOERR", "the disk does not take or give data", "check the disk and its free space, then start again"),
    ("SQLITE_CORRUPT", "the store is damaged", "put a copy back, or save what is readable: sqlite3 FILE .recover"),
    ("SQLITE_NOTADB", "the file is not a nervure store", "name another file; this one was not touched"),
    ("SQLITE_READONLY", "the store may not be written", "make the file and its folder writable, or name another store"),
    ("SQLITE_CANTOPEN", "the store cannot be opened", "check that it is a file in a folder you may write to"),
    ("SQLITE_PERM", "the store may not be opened", "check the permissions of the file and its folder"),
    ("SQLITE_BUSY", "another program keeps the store locked", "close that program and start again"),
    ("SQLITE_LOCKED", "another program keeps the store locked", "close that program and start again"),
)


def _explain(error: Exception, url: sa.URL) -> tuple[str, str, str]:
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    name = getattr(cause, "sqlite_errorname", "")
    where = url.database if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)
    text = " ".join(str(cause).split())
    for start, what, advice in _MEANING:
        if name.startswith(start):
            return what, f"{text} ({where})", advice.replace("FILE", str(where))
    return "the store cannot be used", f"{text} ({where})", "check its address and that it runs"
