"""store: copy, check and prune stores, without torch."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

from cyclopts import Parameter

from nervure._kit import bytes_text
from nervure.cli.display import progress

Json = Annotated[bool, Parameter(name="--json", negative="")]
Flag = Annotated[bool, Parameter(negative="")]
_DAYS = 30.0
_MOST_SHOWN = 50
_MEANING = {
    "failed": ("failed attempts at jobs that are done since", "--failed"),
    "rehearsals": ("records of rehearsals", "--rehearsals"),
    "curves": ("points of curves; the final values stay", "--curves-older-than DAYS"),
    "leases": ("leases of processes that ended without giving them back", "--leases"),
}


def copy(source: str, target: str, /, *, as_json: Json = False) -> int:
    """Copy a store into another, such as a file into PostgreSQL. Copying again adds what is new.

    Args:
        source: Path or address of the store that is read.
        target: Path or address of the store that is written; it is made if need be.
        as_json: Print JSON.

    Returns:
        0.
    """
    from nervure.app import copy_store

    with progress("store copy", silent=as_json) as on_event:
        came = copy_store(source, target, on_event=on_event)
    if as_json:
        print(json.dumps(dataclasses.asdict(came)))
        return 0
    for name, added in came.added.items():
        if added or came.there[name]:
            print(f"{name.removeprefix('nervure_')}: {added} copied, {came.there[name]} there already")
    print(f"read back and equal, sha256 {came.checksum[:16]}")
    return 0


def check(store: str | None = None, /, *, as_json: Json = False) -> int:
    """Look a store through and name what is wrong; nothing is changed.

    Args:
        store: Path or address of the store; your own when left out.
        as_json: Print JSON.

    Returns:
        0; 1 when something was found.
    """
    from nervure.app import check_store

    with progress("store check", silent=as_json) as on_event:
        found = check_store(store, on_event=on_event)
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        for one in found.findings[:_MOST_SHOWN]:
            print(f"{one.what}\n  {one.advice}")
        if len(found.findings) > _MOST_SHOWN:
            print(f"and {len(found.findings) - _MOST_SHOWN} more: --json names them all")
        rest = "Nothing is wrong with it" if not found.findings else "The rest is fine"
        print(f"{rest}: {found.fine} records could be read, schema {found.revision or 'unknown'}.")
    return 1 if found.findings else 0


def prune(
    store: str | None = None,
    /,
    *,
    failed: Flag = False,
    rehearsals: Flag = False,
    curves_older_than: float | None = None,
    leases: Flag = False,
    dry_run: Flag = False,
    as_json: Json = False,
) -> int:
    """Remove what nobody reads any more. Without an option, say what could be removed and remove nothing.

    Args:
        store: Path or address of the store; your own when left out.
        failed: Remove attempts that failed at jobs that are done since.
        rehearsals: Remove what ran with --quick.
        curves_older_than: Remove points of curves of records that began so many days ago or earlier.
        leases: Remove leases of processes that ended without giving them back.
        dry_run: Say what would go, and how much space it takes.
        as_json: Print JSON.

    Returns:
        0.
    """
    from nervure.app import prune_store

    looking = not (failed or rehearsals or leases or curves_older_than is not None)
    with progress("store prune", silent=as_json) as on_event:
        done = prune_store(
            store,
            failed=failed or looking,
            rehearsals=rehearsals or looking,
            curves_older_than=_DAYS if looking else curves_older_than,
            leases=leases or looking,
            dry_run=dry_run or looking,
            on_event=on_event,
        )
    if as_json:
        print(json.dumps(dataclasses.asdict(done) | {"removed": not (dry_run or looking)}))
        return 0
    for part in done.parts:
        what, option = _MEANING[part.kind]
        with_option = f"  ({option.replace('DAYS', f'{_DAYS:g}')})" if looking else ""
        print(f"{part.rows:>8} {what}, about {bytes_text(part.size)}{with_option}")
    if looking:
        print("Nothing was removed: name what is to go.")
    elif dry_run:
        print("Nothing was removed: this was a dry run.")
    elif done.freed is not None:
        print(f"The file is {bytes_text(done.freed)} smaller.")
    return 0
