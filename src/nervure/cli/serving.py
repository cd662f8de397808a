"""web and export site: the pages, on a server or in a folder."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nervure.cli.display import progress

Flag = Annotated[bool, Parameter(negative="")]


def web(
    *,
    port: int = 8294,
    host: str = "127.0.0.1",
    store: str | None = None,
    report: Path = Path("reports"),
    read_only: Flag = False,
    browse: Flag = False,
) -> int:
    """Serve the pages: papers, runs, leaderboards, networks.

    Args:
        port: Port to listen on; 0 takes a free one.
        host: Address to listen on. Beyond this machine the pages only show and start nothing.
        store: Where records are; the user's own store by default.
        report: Folder that audits and landscapes are read from and reports written to.
        read_only: Start no runs from the pages.
        browse: Open the first page in a browser.

    Returns:
        0.

    Raises:
        UsageError: If there is no such port.
    """
    from nervure._kit import UsageError, require

    for needed in ("starlette", "uvicorn"):
        require(needed, extra="web")
    if not 0 <= port <= 65535:
        raise UsageError("there is no such port", expected="0 to 65535", found=port)

    from nervure.app.library import Library
    from nervure.store import Store
    from nervure.web.serve import serve

    def ready(address: str) -> None:
        print(f"nervure web on {address}  (Ctrl-C ends it)", flush=True)
        if browse:
            webbrowser.open(address)

    with Store.open(store) as opened:
        library = Library(opened, reports=report)
        serve(library, host=host, port=port, store=store, reports=report, read_only=read_only, ready=ready)
    return 0


def write_site(folder: Path, *, store: str | None, report: Path) -> int:
    """Write the pages as files.

    Args:
        folder: Where to.
        store: Where records are.
        report: Folder that audits and landscapes are read from.

    Returns:
        0.
    """
    from nervure.app.library import Library
    from nervure.run import Event
    from nervure.store import Store
    from nervure.web import site

    with Store.open(store) as opened, progress("export site", silent=False) as on_event:

        def tick(done: int, total: int) -> None:
            on_event(Event(kind="progress", share=done / total))

        count = site.write_site(Library(opened, reports=report), folder, tick=tick)
    print(f"{count} pages: {folder / 'index.html'}")
    return 0
