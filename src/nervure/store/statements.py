"""Statements that SQLite and PostgreSQL both take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

CHUNK = 500


def insert(connection: sa.Connection, table: sa.Table) -> Any:
    """Return an insert that can say what to do about rows that are there.

    Args:
        connection: Tells the dialect.
        table: The table.

    Returns:
        The statement, still without values.
    """
    return (sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert)(table)


def insert_new(connection: sa.Connection, table: sa.Table) -> Any:
    """Return an insert that passes over rows that are there.

    Args:
        connection: Tells the dialect.
        table: The table.

    Returns:
        The statement, still without values.
    """
    return insert(connection, table).on_conflict_do_nothing()


def chunks(values: Iterable[Any]) -> Iterator[list[Any]]:
    """Cut a list of ids into pieces: a statement takes a limited number of variables.

    Args:
        values: The ids; one that comes twice is taken once.

    Returns:
        The pieces.

    Examples:
        >>> [len(piece) for piece in chunks(range(1100))]
        [500, 500, 100]
    """
    every = list(dict.fromkeys(values))
    return (every[start : start + CHUNK] for start in range(0, len(every), CHUNK))
