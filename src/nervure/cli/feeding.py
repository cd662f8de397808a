"""feed: new papers from public feeds, without torch."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from typing import Annotated

from cyclopts import Parameter

from nervure.cli.display import progress
from nervure.spec import Paper

Json = Annotated[bool, Parameter(name="--json", negative="")]


def pull(
    *,
    source: Annotated[list[str] | None, Parameter(negative="")] = None,
    store: str | None = None,
    as_json: Json = False,
) -> int:
    """Read public feeds of papers and store what is new, not yet runnable, placed in families and ranked.

    Args:
        source: Address of an Atom feed or a JSON list of papers, in place of the usual ones; may be repeated.
        store: Path or address of the store.
        as_json: Print JSON.

    Returns:
        0; 3 when not one feed could be read.
    """
    from nervure.app import feeding

    with progress("feed", silent=as_json) as on_event:
        came = feeding.pull(source or (), store=store, on_event=on_event)
    if as_json:
        print(json.dumps(dataclasses.asdict(came)))
        return 3 if came.failed else 0
    for one in came.sources:
        if one.state == "failed":
            print(f"failed: {one.source}\n  {one.told}", file=sys.stderr)
        elif one.state == "read":
            skipped = f", {one.skipped} without a title or a link" if one.skipped else ""
            print(f"{one.new} new, {one.renewed} known{skipped}: {one.source}")
        else:
            print(f"{', '.join(part for part in (one.state, one.told) if part)}: {one.source}")
    for title, entry in came.known:
        print(f"in the catalogue: {textwrap.shorten(title, 70, placeholder='...')} (nervure show {entry})")
    _print(came.papers[:10])
    return 3 if came.failed else 0


def list_(
    *query: str,
    family: str | None = None,
    limit: int = 20,
    store: str | None = None,
    as_json: Json = False,
) -> int:
    """List the papers that feeds told of, the best first.

    Args:
        query: Only papers with all these words.
        family: Only one family, such as compress.
        limit: How many at most.
        store: Path or address of the store.
        as_json: Print JSON.

    Returns:
        0; 1 when there is none.
    """
    from nervure.app import feeding

    found = feeding.papers(limit=limit, family=family, query=" ".join(query), store=store)
    if as_json:
        print(json.dumps([paper.to_json() for paper in found]))
    elif not found:
        print("Nothing found. `nervure feed pull` asks the feeds.")
    else:
        _print(found)
    return 0 if found else 1


def digest(
    *,
    to: str | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    limit: int = 20,
    days: int = 14,
    store: str | None = None,
) -> int:
    """Mail the new papers that match a subscription, or the best ones, through your own mail server.

    The server is named by NERVURE_SMTP_HOST, NERVURE_SMTP_PORT (587), NERVURE_SMTP_USER, NERVURE_SMTP_FROM and
    NERVURE_SMTP_PASSWORD, or a password in the keyring.

    Args:
        to: The address.
        dry_run: Print the digest; send nothing.
        limit: How many papers at most.
        days: Only papers first seen in the last so many days.
        store: Path or address of the store.

    Returns:
        0.
    """
    from nervure.app import feeding

    mailed = feeding.digest(to, dry_run=dry_run, limit=limit, days=days, store=store)
    if not mailed.digest.papers:
        print("Nothing new.")
    elif mailed.sent:
        count = len(mailed.digest.papers)
        print(f"{count} paper{'' if count == 1 else 's'} mailed to {to}")
    else:
        print(mailed.digest.text(), end="")
    return 0


def subscribe(*query: str, store: str | None = None) -> int:
    """Ask to be told of papers that have all these words.

    Args:
        query: Words; each may end anywhere.
        store: Path or address of the store.

    Returns:
        0.
    """
    from nervure.app import feeding

    new = feeding.subscribe(" ".join(query), store=store)
    print("Subscribed." if new else "You were subscribed to that already.")
    return 0


def unsubscribe(*query: str, store: str | None = None) -> int:
    """Take a subscription back.

    Args:
        query: Its words.
        store: Path or address of the store.

    Returns:
        0; 1 when there was none.
    """
    from nervure.app import feeding

    gone = feeding.unsubscribe(" ".join(query), store=store)
    print("Unsubscribed." if gone else "There is no such subscription. `nervure feed subscriptions` lists them.")
    return 0 if gone else 1


def subscriptions(*, store: str | None = None, as_json: Json = False) -> int:
    """List your subscriptions.

    Args:
        store: Path or address of the store.
        as_json: Print JSON.

    Returns:
        0.
    """
    from nervure.app import feeding

    found = feeding.subscriptions(store=store)
    if as_json:
        print(json.dumps([dataclasses.asdict(one) for one in found]))
    else:
        print("\n".join(f"{one.query}  (since {one.since[:10]})" for one in found) or "None: a digest holds the best.")
    return 0


def _print(papers: tuple[Paper, ...] | list[Paper]) -> None:
    for paper in papers:
        votes = "" if paper.votes is None else str(paper.votes)
        print(
            f"{paper.score:.2f}  {paper.family:<8} {votes:>4}  {textwrap.shorten(paper.title, 90, placeholder='...')}"
        )
        print(f"{'':21}{paper.link}")
