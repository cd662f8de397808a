"""The tables as the newest revision has them, and the way there from any older one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa

from nervure._kit import StoreError

HEAD = "0003"
VERSION_TABLE = "nervure_version"
# Any constant will do: it names the lock under which two processes do not migrate one PostgreSQL database at once.
_MIGRATION_LOCK = 7310294

metadata = sa.MetaData()
records = sa.Table(
    "nervure_records",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("job_id", sa.String(20), nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("arm", sa.Text, nullable=False),
    sa.Column("case", sa.Text, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    # Everything but the measurements, as JSON: text, because JSON has no NaN and PostgreSQL's text no zero byte.
    sa.Column("body", sa.Text, nullable=False),
)
measurements = sa.Table(
    "nervure_measurements",
    metadata,
    sa.Column("record_id", sa.Integer, sa.ForeignKey(records.c.id), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("arm", sa.Text, nullable=False),
    sa.Column("metric", sa.Text, nullable=False),
    # NULL means NaN, which SQLite cannot hold.
    sa.Column("value", sa.Double),
    sa.Column("step", sa.Double),
)
leases = sa.Table(
    "nervure_leases",
    metadata,
    sa.Column("job_id", sa.String(20), primary_key=True),
    sa.Column("owner", sa.String(32), nullable=False),
    sa.Column("machine", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("born", sa.Text, nullable=False),
    sa.Column("renewed", sa.Double, nullable=False),
)
papers = sa.Table(
    "nervure_papers",
    metadata,
    sa.Column("id", sa.String(80), primary_key=True),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("link", sa.Text, nullable=False),
    sa.Column("summary", sa.Text, nullable=False),
    sa.Column("published", sa.Text, nullable=False),
    sa.Column("votes", sa.Integer),
    sa.Column("family", sa.Text, nullable=False),
    sa.Column("score", sa.Double, nullable=False),
    # ISO 8601 in UTC of one length, so that the order of the text is that of the time.
    sa.Column("first_seen", sa.String(20), nullable=False),
)
mailings = sa.Table(
    "nervure_mailings",
    metadata,
    sa.Column("address", sa.Text, primary_key=True),
    sa.Column("paper_id", sa.String(80), sa.ForeignKey(papers.c.id), primary_key=True),
    sa.Column("mailed", sa.String(20), nullable=False),
)
subscriptions = sa.Table(
    "nervure_subscriptions",
    metadata,
    sa.Column("query", sa.Text, primary_key=True),
    sa.Column("since", sa.String(20), nullable=False),
)
feeds = sa.Table(
    "nervure_feeds",
    metadata,
    sa.Column("url", sa.Text, primary_key=True),
    sa.Column("etag", sa.Text, nullable=False),
    sa.Column("last_modified", sa.Text, nullable=False),
    # Seconds since 1970: when it was last asked for, and before when it is not asked again.
    sa.Column("fetched", sa.Double, nullable=False),
    sa.Column("next_try", sa.Double, nullable=False),
)


def revision(connection: sa.Connection) -> str | None:
    """Return the revision a database is at.

    Args:
        connection: A connection to it.

    Returns:
        The revision, or None where there is no store yet.
    """
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()


def upgrade(connection: sa.Connection, to: str = HEAD) -> None:
    """Bring a database to a revision, all or nothing, inside the caller's transaction.

    Args:
        connection: A connection in a writing transaction.
        to: The revision.

    Raises:
        StoreError: If the database is of a newer revision than this code knows, or not a store.
    """
    # Imported here: a store that is up to date, which is the usual case, needs no alembic.
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
    scripts = ScriptDirectory(str(Path(__file__).parent / "migrations"))
    known = {script.revision for script in scripts.walk_revisions()}
    found = revision(connection)
    if found == to:
        return
    if found is not None and found not in known:
        raise StoreError(
            "the store was written by a newer nervure",
            expected=f"schema {HEAD} or older",
            found=f"schema {found}",
            try_="upgrade nervure; the store was not touched",
        )
    if found is None and connection.dialect.name == "sqlite" and sa.inspect(connection).get_table_names():
        raise StoreError(
            "the file is a database, but not a nervure store",
            found=f"tables {', '.join(sorted(sa.inspect(connection).get_table_names())[:3])}",
            try_="name another file; this one was not touched",
        )

    def steps(current: Any, _context: object) -> Any:
        return scripts._upgrade_revs(to, current)

    with EnvironmentContext(Config(), scripts, fn=steps, destination_rev=to) as environment:
        environment.configure(connection=connection, version_table=VERSION_TABLE)
        environment.run_migrations()
