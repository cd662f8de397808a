"""Listen on an address until the user ends it."""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import uvicorn

from nervure._kit import CouldNotRun
from nervure.app.library import Library
from nervure.web.launcher import Launcher
from nervure.web.server import LOOPBACK, Server

_TURN_SECONDS = 0.0005


def serve(
    library: Library,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    store: str | None = None,
    reports: Path = Path("reports"),
    read_only: bool = False,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve the pages until Ctrl-C or SIGTERM.

    Args:
        library: What there is to show.
        host: Address to listen on; beyond this machine nothing can be started from a page.
        port: Port; 0 takes a free one.
        store: Where runs put their records, as ``--store`` takes it.
        reports: Folder for reports.
        read_only: Start nothing from a page.
        ready: Called with the address when the server listens.

    Raises:
        CouldNotRun: If the address cannot be listened on.
    """
    local = is_loopback(host)
    launcher = Launcher(store=store, reports=reports) if local and not read_only else None
    server = Server(library, launcher=launcher, hosts=LOOPBACK if local else (*LOOPBACK, host))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
    except OSError as error:
        listener.close()
        raise CouldNotRun(
            f"nothing can listen on {host}:{port}", found=str(error), try_="--port 0 for a free port"
        ) from error
    shown = f"[{host}]" if ":" in host else host
    ready(f"http://{shown}:{listener.getsockname()[1]}/")
    config = uvicorn.Config(
        server.app(), log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2,
        timeout_keep_alive=15, limit_concurrency=1000, h11_max_incomplete_event_size=16 * 1024,
    )  # fmt: skip
    before = sys.getswitchinterval()
    # The thread that renders would keep the one that answers waiting for five milliseconds at every turn.
    sys.setswitchinterval(_TURN_SECONDS)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        sys.setswitchinterval(before)
        listener.close()


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address.

    Args:
        host: A name or address.

    Returns:
        True for localhost and loopback addresses.

    Examples:
        >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
        (True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
