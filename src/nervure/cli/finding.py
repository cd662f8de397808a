"""find, list and show: the catalogue, without torch."""

from __future__ import annotations

import json
import textwrap
from typing import Annotated

from cyclopts import Parameter

from nervure.catalogue import Entry, entries, get, search

Json = Annotated[bool, Parameter(name="--json", negative="")]


def _line(entry: Entry) -> str:
    mark = "*" if entry.runnable else " "
    year = entry.card["year"] or "    "
    return f"{mark} {entry.id:<36} {year}  {textwrap.shorten(entry.card['title'], 76, placeholder='...')}"


def _dump(found: list[Entry]) -> None:
    print(json.dumps([{**entry.card, "runnable": entry.runnable, "claims": list(entry.claims)} for entry in found]))


def find(
    *query: str,
    limit: int = 10,
    as_json: Json = False,
) -> int:
    """Find papers and methods by words of their title, summary and tags.

    Args:
        query: Words, such as: prune before training.
        limit: How many at most.
        as_json: Print JSON.

    Returns:
        0; 1 when nothing was found.
    """
    found = search(" ".join(query), limit=limit)
    if as_json:
        _dump(found)
    elif not found:
        print("Nothing found. `nervure list` shows everything.")
    else:
        print("\n".join(_line(entry) for entry in found))
        print("\n* runnable: `nervure show ID` says what it claims, `nervure run ID` checks it.")
    return 0 if found else 1


def list_(
    *,
    runnable: Annotated[bool, Parameter(negative="")] = False,
    family: str | None = None,
    as_json: Json = False,
) -> int:
    """List the papers of the catalogue.

    Args:
        runnable: Only papers whose method nervure has.
        family: Only one family, such as compress.
        as_json: Print JSON.

    Returns:
        0.
    """
    found = [
        entry
        for entry in entries().values()
        if (entry.runnable or not runnable) and family in (None, entry.card["family"])
    ]
    if as_json:
        _dump(found)
    else:
        print("\n".join(_line(entry) for entry in found))
        print(f"\n{len(found)} papers, {sum(entry.runnable for entry in found)} of them runnable (*)")
    return 0


def show(paper: str, *, as_json: Json = False) -> int:
    """Show one paper's card: what it says, what nervure makes of it, what it claims.

    Args:
        paper: Its id or number.
        as_json: Print JSON.

    Returns:
        0.
    """
    entry = get(paper)
    if as_json:
        _dump([entry])
        return 0
    card = entry.card
    print(f"{card['title']} ({card['year'] or 'year unknown'})")
    number = f"paper {card['n']}" if card["n"] else None
    print(" · ".join(part for part in (entry.id, number, card["family"], card["link"]) if part) + "\n")
    print(textwrap.fill(card["summary"], 100))
    if not entry.runnable:
        print("\nNot yet runnable: the paper is in the catalogue, its method is not in this version.")
        return 0
    package = ".".join(str(entry.module).split(".")[:2])
    print(f"\nfrom {package} import {', '.join(card['provides'])}")
    for title, name in (("Needs", "needs"), ("Differs from the paper", "deviations"), ("Verified", "verified")):
        if card[name]:
            print(f"\n{title}")
            for line in card[name]:
                print(textwrap.fill(line, 98, initial_indent="- ", subsequent_indent="  "))
    for claim in entry.claims:
        print(f"\nClaim {entry.id}/{claim['name']} ({claim['seeds']} seeds, {claim['minutes']:g} min)")
        print(textwrap.fill(claim["statement"], 98, initial_indent="  ", subsequent_indent="  "))
    return 0
