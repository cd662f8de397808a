"""What feeds told of: papers, subscriptions, what was mailed, and when each feed may be asked again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from nervure.spec import Paper
from nervure.store import schema
from nervure.store.place import told, writing
from nervure.store.statements import CHUNK, chunks, insert, insert_new


@dataclass(frozen=True)
class Subscription:
    """Hold what the user wants to be told of.

    Args:
        query: Words that a paper must have.
        since: When it was made, ISO 8601 in UTC.
    """

    query: str
    since: str


@dataclass(frozen=True)
class FeedState:
    """Hold what is remembered of a feed between two visits.

    Args:
        url: Its address.
        etag: The validator its server sent last, or empty.
        last_modified: The date its server sent last, or empty.
        fetched: When it was last asked for, in seconds since 1970.
        next_try: Before when it is not to be asked again.
    """

    url: str
    etag: str = ""
    last_modified: str = ""
    fetched: float = 0.0
    next_try: float = 0.0


class Papers:
    """Keep papers that feeds told of. `Store.papers` gives one.

    What a feed says first of a paper stays; a later feed changes its votes, family and score alone.

    Args:
        engine: The engine of a database at the newest revision.

    Examples:
        >>> import tempfile
        >>> from nervure.spec import Paper
        >>> from nervure.store import Store
        >>> with tempfile.TemporaryDirectory() as folder, Store.open(f"{folder}/store.db") as store:
        ...     new = Paper(id="arxiv:1", source="https://example.org", title="A", link="https://example.org/a")
        ...     store.papers.add([new]), store.papers.add([new]), len(store.papers.ranked())
        (['arxiv:1'], [], 1)
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def add(self, papers: Iterable[Paper]) -> list[str]:
        """Store papers; of those that are there, renew what may change.

        Args:
            papers: The papers; `Paper.first_seen` is set here.

        Returns:
            The ids of those that are new.
        """
        new, now = [], stamp()
        with told(self._engine.url), writing(self._engine) as connection:
            for paper in papers:
                row = asdict(paper) | {"first_seen": now}
                insert = insert_new(connection, schema.papers).values(row).returning(schema.papers.c.id)
                if connection.execute(insert).scalar() is not None:
                    new.append(paper.id)
                    continue
                changed = {"family": paper.family, "score": paper.score}
                if paper.votes is not None:
                    changed["votes"] = paper.votes
                connection.execute(schema.papers.update().where(schema.papers.c.id == paper.id).values(changed))
        return new

    def count(self) -> int:
        """Return how many papers there are."""
        with told(self._engine.url), self._engine.connect() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(schema.papers)).scalar_one())

    def get(self, ids: Iterable[str]) -> dict[str, Paper]:
        """Return the papers of these ids that are stored, by id."""
        found: dict[str, Paper] = {}
        with told(self._engine.url), self._engine.connect() as connection:
            for chunk in chunks(ids):
                query = sa.select(schema.papers).where(schema.papers.c.id.in_(chunk))
                found.update((row.id, _paper(row)) for row in connection.execute(query))
        return found

    def ranked(
        self,
        *,
        limit: int | None = None,
        family: str | None = None,
        since: str = "",
        not_mailed_to: str | None = None,
        keep: Callable[[Paper], bool] = lambda paper: True,
    ) -> list[Paper]:
        """Return papers, the best first, and the newer first among equals.

        Args:
            limit: How many at most.
            family: Only those of this family.
            since: Only those first seen then or later, ISO 8601 in UTC.
            not_mailed_to: Only those that were not mailed to this address.
            keep: Only those for which it is true.

        Returns:
            The papers.
        """
        table = schema.papers.c
        query = sa.select(schema.papers).where(table.first_seen >= since)
        query = query.order_by(table.score.desc(), table.first_seen.desc(), table.id)
        if family is not None:
            query = query.where(table.family == family)
        if not_mailed_to is not None:
            mailed = schema.mailings.c
            query = query.where(~sa.exists().where(mailed.paper_id == table.id, mailed.address == not_mailed_to))
        found: list[Paper] = []
        with told(self._engine.url), self._engine.connect() as connection:
            for row in connection.execution_options(yield_per=CHUNK).execute(query):
                if limit is not None and len(found) >= limit:
                    break
                if keep(paper := _paper(row)):
                    found.append(paper)
        return found

    def mailed(self, address: str, ids: Sequence[str]) -> None:
        """Remember that these papers were mailed to an address.

        Args:
            address: The address.
            ids: The papers' ids.
        """
        with told(self._engine.url), writing(self._engine) as connection:
            for one in ids:
                row = {"address": address, "paper_id": one, "mailed": stamp()}
                connection.execute(insert_new(connection, schema.mailings).values(row))

    def subscribe(self, query: str) -> bool:
        """Add a subscription.

        Args:
            query: The words.

        Returns:
            False if it was there.
        """
        column = schema.subscriptions.c.query
        with told(self._engine.url), writing(self._engine) as connection:
            insert = insert_new(connection, schema.subscriptions).values(query=query, since=stamp()).returning(column)
            return connection.execute(insert).scalar() is not None

    def unsubscribe(self, query: str) -> bool:
        """Remove a subscription.

        Args:
            query: The words.

        Returns:
            False if there was none.
        """
        table = schema.subscriptions
        with told(self._engine.url), writing(self._engine) as connection:
            delete = table.delete().where(table.c.query == query).returning(table.c.query)
            return connection.execute(delete).scalar() is not None

    def subscriptions(self) -> list[Subscription]:
        """Return the subscriptions in the order of their words."""
        query = sa.select(schema.subscriptions).order_by(schema.subscriptions.c.query)
        with told(self._engine.url), self._engine.connect() as connection:
            return [Subscription(row.query, row.since) for row in connection.execute(query)]

    def feed(self, url: str) -> FeedState:
        """Return what is remembered of a feed; an unknown one was never asked for."""
        query = sa.select(schema.feeds).where(schema.feeds.c.url == url)
        with told(self._engine.url), self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        return FeedState(url) if row is None else FeedState(**row._mapping)

    def remember(self, state: FeedState) -> None:
        """Keep what is to be remembered of a feed.

        Args:
            state: It replaces what was remembered.
        """
        values = asdict(state)
        with told(self._engine.url), writing(self._engine) as connection:
            statement = insert(connection, schema.feeds).values(values)
            connection.execute(statement.on_conflict_do_update(index_elements=["url"], set_=values))


def stamp(seconds_ago: float = 0.0) -> str:
    """Return a time as the tables have it.

    Args:
        seconds_ago: How long ago.

    Returns:
        ISO 8601 in UTC.
    """
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - seconds_ago))


def _paper(row: Any) -> Paper:
    return Paper(**row._mapping)
