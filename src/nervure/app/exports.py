"""Write a verdict or leaderboard again from the stored records."""

from __future__ import annotations

from pathlib import Path

from nervure._kit import UnknownId, UsageError
from nervure.app.library import Library, repeat
from nervure.arena import find_claim, prune
from nervure.arena.contest import CONTESTS
from nervure.report import leaderboard_files, verdict_files
from nervure.store import Store


def export(what: str, *, store: str | Path | None = None, folder: str | Path = "reports") -> list[Path]:
    """Write JSON, CSV and HTML of what the store has.

    Where the store holds several settings of one claim or comparison (a rehearsal, another data set, other steps),
    the one measured last is written.

    Args:
        what: A claim (``card`` or ``card/claim``), ``compare-prune``, or ``compare-`` and a contest's name.
        store: The store; None for the user's own.
        folder: Where to.

    Returns:
        The paths.

    Raises:
        UsageError: If the store has no record of it.
    """
    name = what.removeprefix("compare-")
    comparison = name != what and (name in CONTESTS or name == prune.NAME)
    target = f"arena:{name}" if comparison else f"claim:{find_claim(what).id}"
    with Store.open(store) as opened:
        library = Library(opened)
        try:
            run = library.latest(target)
        except UnknownId as error:
            again = what.replace("compare-", "compare ", 1) if comparison else f"run {what}"
            raise UsageError(f"the store has no record of {what}", try_=f"nervure {again}") from error
        if comparison:
            return leaderboard_files(library.board(run), Path(folder))
        card = find_claim(run.name).card
        return verdict_files(library.verdict(run), card, library.records(run), Path(folder), command=repeat(run))
