"""Write the pages as a folder of files that needs no server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nervure._kit import CouldNotRun, UsageError
from nervure.app.library import Library
from nervure.catalogue import entries
from nervure.web import statics
from nervure.web.links import Links
from nervure.web.pages import Pages

_MARK = ".nervure-site"


def write_site(library: Library, folder: Path, *, tick: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Write every page.

    Args:
        library: What there is to show.
        folder: Where to: a new or empty folder, or one written by this before.
        tick: Called with (pages done, pages in all).

    Returns:
        How many pages were written.

    Raises:
        UsageError: If the folder holds something else.
        CouldNotRun: If it cannot be written to.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / _MARK).exists())):
        raise UsageError(
            f"{folder} holds something else", expected="a new folder, an empty one or a site", try_="another folder"
        )
    top = Pages(library, links=Links(root="", ending=".html"))
    below = Pages(library, links=Links(root="../", ending=".html"))
    plan: dict[str, Callable[[], str]] = {
        "index": top.catalogue,
        "runs": top.runs,
        "leaderboards": top.leaderboards,
        "networks": top.audits,
        "feed": top.feed,
    }
    plan |= {f"paper/{name}": _bound(below.paper, name) for name in entries()}
    plan |= {f"run/{run.id}": _bound(below.run, run.id) for run in library.runs()}
    for kind in ("audit", "landscape"):
        plan |= {f"network/{name}": _bound(below.network, name) for name in library.pages(kind)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARK).touch()
        for done, (name, make) in enumerate(plan.items()):
            tick(done, len(plan))
            _write(folder / f"{name}.html", make())
        for name, text in statics.files().items():
            _write(folder / "static" / name, text)
    except OSError as error:
        raise CouldNotRun(f"the site cannot be written to {folder}", found=str(error)) from error
    return len(plan)


def _bound(make: Callable[[str], str], name: str) -> Callable[[], str]:
    return lambda: make(name)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
