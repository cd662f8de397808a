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


def default_path() -> str | Path:
    """Return where the store is when nobody says otherwise.

    Returns:
        ``$NERVURE_STORE``, a path or an address, or ``nervure/store.db`` in the user's data directory.
    """
    if named := os.environ.get("NERVURE_STORE"):
        # A path would make one slash of an address's two.
        return named if "://" in named else Path(named)
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
    engine = bare(where)
    if engine.dialect.name == "sqlite":
        _make_folder(str(engine.url.database))
        event.listen(engine, "connect", _on_connect)
    try:
        with told(engine.url):
            with engine.connect() as connection:
                if schema.revision(connection) == schema.HEAD:
                    return engine
                _refuse_encoding(connection)
            with writing(engine) as connection:
                schema.upgrade(connection)
    except BaseException:
        engine.dispose()
        raise
    return engine


def bare(where: str | Path) -> sa.Engine:
    """Return an engine on a store as it is: nothing is created, upgraded or set.

    Args:
        where: A path, or an SQLAlchemy URL.

    Returns:
        The engine.

    Raises:
        UsageError: If it is neither a path nor a URL of SQLite or PostgreSQL.
    """
    url = _url(where)
    if url.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise UsageError("the store cannot live there", expected="a file, sqlite:// or postgresql://", found=url)
    if url.get_backend_name() == "postgresql":
        require("psycopg", extra="postgres")
        # A run of days outlives a restart of the server: a connection is tried before it is used.
        return sa.create_engine(url, pool_pre_ping=True, isolation_level="READ COMMITTED")
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _on_bare_connect)
    event.listen(engine, "begin", _on_begin)
    return engine


def exists(where: str | Path) -> bool:
    """Say whether there is something to open; an address that is mistyped is not to become a new store.

    Args:
        where: A path, or an SQLAlchemy URL.

    Returns:
        Whether the file is there, or the database has a store's tables.
    """
    engine = bare(where)
    try:
        if engine.dialect.name == "sqlite":
            database = str(engine.url.database)
            return database.startswith("file:") or Path(database).exists()
        with told(engine.url), engine.connect() as connection:
            return schema.revision(connection) is not None
    finally:
        engine.dispose()


def shown(url: sa.URL) -> str:
    """Return where a store is, for a message: without the password.

    Args:
        url: Where it is.

    Returns:
        The file, or the address.
    """
    return str(url.database) if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)


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
        what, found, advice = explain(error, url)
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
        url = sa.URL.create("sqlite", database=str(Path(where).expanduser().absolute()))
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise UsageError("a store in memory would be lost at the end", expected="a file")
    return url


def _make_folder(database: str) -> None:
    """Make the folder of a database's file.

    Raises:
        StoreError: If that cannot be.
    """
    folder = Path(database).parent
    if database.startswith("file:"):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"the store's folder {folder} cannot be made: {error.strerror}") from error


def _refuse_encoding(connection: sa.Connection) -> None:
    """Refuse a database in which not every name can be written.

    Raises:
        StoreError: If its encoding is not UTF-8.
    """
    if connection.dialect.name != "postgresql":
        return
    found = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
    if found != "UTF8":
        raise StoreError(
            "the database cannot hold every character",
            expected="the encoding UTF8",
            found=found,
            try_="createdb --encoding UTF8 --template template0 NAME",
        )


def _on_bare_connect(connection: sqlite3.Connection, _record: object) -> None:
    # The driver's own transaction handling commits behind our back before DDL; _on_begin begins instead.
    connection.isolation_level = None


def _on_connect(connection: sqlite3.Connection, record: object) -> None:
    _on_bare_connect(connection, record)
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


# By the beginning of the error's name in SQLite or code in PostgreSQL: what happened, and what to do.
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
    ("53100", "the server's disk is full", "free some space there and start again; what is stored is kept"),
    ("53300", "the server takes no more connections", "raise its max_connections, or start fewer processes"),
    ("25006", "the store may not be written", "name the server that takes writes, not a copy of it"),
    ("42501", "the store may not be used by this user", "let the database's owner grant it"),
    ("57P", "the server stopped or is starting", "start again when it runs; what is stored is kept"),
)


def explain(error: Exception, url: sa.URL) -> tuple[str, str, str]:
    """Say what a database's error means.

    Args:
        error: The error.
        url: Where the store is.

    Returns:
        What happened, the error's own words, and what to do.
    """
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    # SQLite gives its errors names, PostgreSQL gives them codes.
    name = getattr(cause, "sqlite_errorname", None) or getattr(cause, "sqlstate", None) or ""
    where = shown(url)
    text = " ".join(str(cause).split())
    for start, what, advice in _MEANING:
        if name.startswith(start):
            return what, f"{text} ({where})", advice.replace("FILE", where)
    return "the store cannot be used", f"{text} ({where})", "check its address and that it runs"
