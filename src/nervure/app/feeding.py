"""Feeds of new papers: pull them, list them, mail them. The only place that joins the store and the feeds."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from nervure._kit import BadBudget, UsageError, seconds_text
from nervure.feed import SOURCES, Digest, FeedError, Fetcher, Parsed, Ranker, matches, parse, twin
from nervure.feed.address import source_address
from nervure.feed.mail import Server, mail_address
from nervure.feed.parse import clean
from nervure.feed.rank import words
from nervure.run import Event
from nervure.spec import FAMILIES, Paper
from nervure.store import FeedState, Store, Subscription
from nervure.store.papers import stamp

OnEvent = Callable[[Event], None]
_QUERY = 200


@dataclass(frozen=True)
class SourcePulled:
    """Say what came of one feed.

    Args:
        source: Its address.
        state: ``"read"``; ``"unchanged"`` since the last visit; ``"fresh"``: it was not asked, because the last visit
            is too near or its server asked not to be; ``"failed"``.
        new: How many of its papers are new.
        renewed: How many were known; their votes and score are renewed.
        skipped: How many of its entries have no title or no usable link.
        told: For a person: why it failed, or when it is asked again.
    """

    source: str
    state: Literal["read", "unchanged", "fresh", "failed"]
    new: int = 0
    renewed: int = 0
    skipped: int = 0
    told: str = ""


@dataclass(frozen=True)
class Pulled:
    """Say what came of all feeds.

    Args:
        sources: What came of each.
        papers: The papers that are new, the best first.
        known: (title in the feed, id) of papers that the catalogue has already; they are not stored.
    """

    sources: tuple[SourcePulled, ...]
    papers: tuple[Paper, ...]
    known: tuple[tuple[str, str], ...]

    @property
    def failed(self) -> bool:
        """Return whether not one feed could be read."""
        return bool(self.sources) and all(one.state == "failed" for one in self.sources)


@dataclass(frozen=True)
class Mailed:
    """Say what a digest held and whether it went out.

    Args:
        digest: The digest.
        sent: Whether it was mailed: not in a dry run, and not without papers.
    """

    digest: Digest
    sent: bool


def pull(
    sources: Sequence[str] = (),
    *,
    store: str | Path | None = None,
    fetcher: Fetcher | None = None,
    on_event: OnEvent = lambda event: None,
) -> Pulled:
    """Read feeds, place and rank their papers, and store those that are new.

    A feed that fails does not keep the others from being read. None is asked more often than it wishes.

    Args:
        sources: Addresses of feeds; by default those in `nervure.feed.SOURCES`.
        store: Path or address of the store, or None for the user's own.
        fetcher: How to fetch.
        on_event: Called with what happens.

    Returns:
        What came of it.
    """
    addresses = list(dict.fromkeys(source_address(one) for one in sources or SOURCES))
    fetcher = fetcher or Fetcher()
    came, new, known = [], [], {}
    with Store.open(store) as opened:
        ranker = Ranker(_ran(opened))
        for count, address in enumerate(addresses):
            on_event(Event(kind="progress", share=count / len(addresses), text=f"asking {urlsplit(address).hostname}"))
            parsed, visit, result = _ask(opened, fetcher, address)
            if parsed is not None:
                known.update({paper.id: (paper.title, entry.id) for paper in parsed.papers if (entry := twin(paper))})
                fresh = [paper for paper in parsed.papers if paper.id not in known]

                def share(part: float, count: int = count) -> None:
                    on_event(Event(kind="progress", share=(count + part) / len(addresses), text="ranking"))

                added = _take(opened, ranker, fresh, share)
                new += added
                result = dataclasses.replace(result, new=len(added), renewed=len(fresh) - len(added))
            # Only now: who remembers the answer's validators before its papers are stored may never see them again.
            opened.papers.remember(visit)
            came.append(result)
        papers = opened.papers.get(new)
    on_event(Event(kind="progress", share=1.0, text="done"))
    ranked = sorted(papers.values(), key=lambda paper: -paper.score)
    return Pulled(tuple(came), tuple(ranked), tuple(known.values()))


def papers(
    *, limit: int = 50, family: str | None = None, query: str = "", store: str | Path | None = None
) -> list[Paper]:
    """Return the papers that feeds told of, the best first.

    Args:
        limit: How many at most, at least 1.
        family: Only those of this family.
        query: Only those with all these words.
        store: Path or address of the store, or None for the user's own.

    Returns:
        The papers.

    Raises:
        UsageError: If there is no such family.
    """
    if family not in (None, *FAMILIES):
        raise UsageError(f"there is no family {family!r}", expected=", ".join(FAMILIES))
    with Store.open(store) as opened:
        return opened.papers.ranked(limit=_at_least_one(limit), family=family, keep=lambda paper: matches(query, paper))


def subscribe(query: str, *, store: str | Path | None = None) -> bool:
    """Ask to be told of papers that have all words of a query.

    Args:
        query: Words; each may end anywhere.
        store: Path or address of the store, or None for the user's own.

    Returns:
        False if it was there already.
    """
    wanted = _query(query)
    with Store.open(store) as opened:
        return opened.papers.subscribe(wanted)


def unsubscribe(query: str, *, store: str | Path | None = None) -> bool:
    """Take a subscription back.

    Args:
        query: Its words.
        store: Path or address of the store, or None for the user's own.

    Returns:
        False if there was none.
    """
    wanted = _query(query)
    with Store.open(store) as opened:
        return opened.papers.unsubscribe(wanted)


def subscriptions(*, store: str | Path | None = None) -> list[Subscription]:
    """Return the subscriptions.

    Args:
        store: Path or address of the store, or None for the user's own.

    Returns:
        The subscriptions in the order of their words.
    """
    with Store.open(store) as opened:
        return opened.papers.subscriptions()


def digest(
    to: str | None = None,
    *,
    dry_run: bool = False,
    limit: int = 20,
    days: int = 14,
    store: str | Path | None = None,
    server: Server | None = None,
) -> Mailed:
    """Mail the papers that match a subscription, or the best where there is none, and were not mailed there before.

    They count as mailed once the server took the letter: a crash in between mails them twice rather than never.

    Args:
        to: The address; needed unless it is a dry run.
        dry_run: Send nothing and remember nothing.
        limit: How many papers at most, at least 1.
        days: Only papers first seen in the last so many days, at least 1.
        store: Path or address of the store, or None for the user's own.
        server: The mail server; by default the one that the environment names.

    Returns:
        The digest, and whether it went out.

    Raises:
        UsageError: If the address is missing or none.
    """
    if to is None and not dry_run:
        raise UsageError("the digest has no address", try_="--to ADDRESS, or --dry-run")
    address = None if to is None else mail_address(to)
    since = stamp(86400.0 * min(_at_least_one(days), 36500))
    with Store.open(store) as opened:
        queries = [one.query for one in opened.papers.subscriptions()]
        found = opened.papers.ranked(
            limit=_at_least_one(limit),
            since=since,
            not_mailed_to=None if address is None else address.lower(),
            keep=lambda paper: not queries or any(matches(query, paper) for query in queries),
        )
        matched = [query for query in queries if any(matches(query, paper) for paper in found)]
        letter = Digest(tuple(found), tuple(matched))
        if dry_run or address is None or not found:
            return Mailed(letter, False)
        server = server or Server.of()
        server.send(letter.message(sender=server.sender, to=address))
        opened.papers.mailed(address.lower(), [paper.id for paper in found])
    return Mailed(letter, True)


def _ask(store: Store, fetcher: Fetcher, address: str) -> tuple[Parsed | None, FeedState, SourcePulled]:
    """Return what a feed says, what is to be remembered of the visit, and what to tell."""
    state, now = store.papers.feed(address), time.time()
    # A clock that was set back must not keep a feed shut for ever.
    if state.fetched <= now < state.next_try:
        return None, state, SourcePulled(address, "fresh", told=f"asked again in {seconds_text(state.next_try - now)}")
    try:
        answer = fetcher.get(address, etag=state.etag, last_modified=state.last_modified)
        parsed = None if answer.body is None else parse(answer.body, source=address, charset=answer.charset)
    except FeedError as error:
        # The validators stay those of the last answer that could be read.
        visit = dataclasses.replace(state, fetched=now, next_try=now + error.wait)
        return None, visit, SourcePulled(address, "failed", told=str(error))
    visit = dataclasses.replace(state, fetched=now, next_try=now + answer.fresh)
    if parsed is None:
        return None, visit, SourcePulled(address, "unchanged")
    visit = dataclasses.replace(visit, etag=answer.etag, last_modified=answer.last_modified)
    return parsed, visit, SourcePulled(address, "read", skipped=parsed.skipped)


def _take(store: Store, ranker: Ranker, found: Sequence[Paper], share: Callable[[float], None]) -> list[str]:
    """Rank and store papers; those whose votes did not change keep the score they have."""
    there = store.papers.get(paper.id for paper in found)
    placed = []
    for count, paper in enumerate(found):
        share(count / len(found))
        old = there.get(paper.id)
        if old is None:
            placed.append(ranker.place(paper))
        elif paper.votes not in (None, old.votes):
            placed.append(ranker.place(dataclasses.replace(old, votes=paper.votes)))
    return store.papers.add(placed)


def _ran(store: Store) -> set[str]:
    """Return the ids of the papers whose claims have a record."""
    found = (re.match(r"claim:([^/]+)/", target) for target in store.targets())
    return {one[1] for one in found if one}


def _query(text: str) -> str:
    query = clean(text, _QUERY + 1).lower()
    if not words(query) or len(query) > _QUERY:
        raise UsageError("a subscription is a few words", expected=f"1 to {_QUERY} characters", found=repr(query[:60]))
    return query


def _at_least_one(number: int) -> int:
    if number < 1:
        raise BadBudget("the number is too small", expected="1 or more", found=number)
    return number
