"""Look after a store: copy it to another database, check it, remove what nobody reads any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from nervure._kit import UsageError
from nervure.app.jobs import OnEvent
from nervure.run import Event
from nervure.store import Checked, Copied, Pruned, check, copy, default_path, prune
from nervure.store.place import bare, connect, exists, shown


def copy_store(source: str | Path, target: str | Path, *, on_event: OnEvent = lambda event: None) -> Copied:
    """Copy a store into another; a copy that was interrupted goes on where it ended.

    Args:
        source: Path or address of the store that is read. An older one is upgraded first.
        target: Path or address of the store that is written; it is made if need be.
        on_event: Called with what happens.

    Returns:
        What was copied.

    Examples:
        >>> import tempfile
        >>> from nervure.spec import Job, Record, Status
        >>> from nervure.store import Store
        >>> job = Job(target="claim:snip/keeps-accuracy", arm="*", case="lenet", seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Store.open(f"{folder}/a.db") as store:
        ...         _ = store.add(Record(job=job, status=Status.DONE))
        ...     for _ in range(2):
        ...         copy_store(f"{folder}/a.db", f"{folder}/b.db").added["nervure_records"]
        ...     check_store(f"{folder}/b.db").fine
        1
        0
        1
    """
    with _open(source, connect) as reading:
        writing = connect(target)
        try:
            return copy(reading, writing, progress=_progress(on_event))
        finally:
            writing.dispose()


def check_store(store: str | Path | None = None, *, on_event: OnEvent = lambda event: None) -> Checked:
    """Look a store through and name what is wrong; nothing is changed.

    Args:
        store: Path or address of the store, or None for the user's own.
        on_event: Called with what happens.

    Returns:
        What was found.
    """
    with _open(default_path() if store is None else store, bare) as engine:
        return check(engine, progress=_progress(on_event))


def prune_store(
    store: str | Path | None = None,
    *,
    failed: bool = False,
    rehearsals: bool = False,
    curves_older_than: float | None = None,
    leases: bool = False,
    dry_run: bool = False,
    on_event: OnEvent = lambda event: None,
) -> Pruned:
    """Remove from a store what was asked for.

    Args:
        store: Path or address of the store, or None for the user's own.
        failed: Remove attempts that failed at jobs that are done since.
        rehearsals: Remove what ran with ``--quick``.
        curves_older_than: Remove points of curves of records that began so many days ago or earlier.
        leases: Remove leases of processes that ended without giving them back.
        dry_run: Only look.
        on_event: Called with what happens.

    Returns:
        What went, or would go.
    """
    with _open(default_path() if store is None else store, connect) as engine:
        return prune(
            engine,
            failed=failed,
            rehearsals=rehearsals,
            curves_older_than=curves_older_than,
            leases=leases,
            dry_run=dry_run,
            progress=_progress(on_event),
        )


@contextmanager
def _open(where: str | Path, how: Callable[[str | Path], sa.Engine]) -> Iterator[sa.Engine]:
    """Open a store that is there; an address that is mistyped is not to become a new one.

    Yields:
        The engine.

    Raises:
        UsageError: If nothing is there.
    """
    if not exists(where):
        engine = bare(where)
        raise UsageError("there is no store", found=shown(engine.url), try_="check the path or address")
    engine = how(where)
    try:
        yield engine
    finally:
        engine.dispose()


def _progress(on_event: OnEvent) -> Callable[[float, str], None]:
    began = time.monotonic()

    def tell(share: float, text: str) -> None:
        spent = time.monotonic() - began
        left = spent * (1 - share) / share if share > 0.02 else None
        on_event(Event(kind="progress", share=share, seconds_left=left, text=text))

    return tell
