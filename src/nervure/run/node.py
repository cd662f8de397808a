"""What runs on a node of a Ray cluster: one job at a time, as JSON text in and out, and the mailbox for progress."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nervure
from nervure.run.attempt import HARD_LIMIT, attempt
from nervure.spec import Job

# Over a network, and to a terminal that shows two a second.
_REPORT_SECONDS = 0.5
# The driver kills a job at HARD_LIMIT; this long after, the node does it without having been told.
GRACE_SECONDS = 30.0
Tell = Callable[[float, str], None]


@functools.cache
def code_version() -> str:
    """Return nervure's version and the hash of its sources, such as ``"0.1.0+5f2a..."``.

    Returns:
        The same text where the same code is installed, wherever it lies.
    """
    digest = hashlib.sha256()
    root = Path(nervure.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"{nervure.__version__}+{digest.hexdigest()[:16]}"


def serve_text(job: str, work: str, version: str, home: str, paths: Sequence[str], tell: Tell) -> str:
    """Do one job on this node, unless its code is not the driver's.

    Args:
        job: The job as JSON.
        work: Name of the work function.
        version: The driver's `code_version`.
        home: The driver's working directory; taken over where it exists here, so that relative paths mean the same.
        paths: Where the driver finds modules; those that exist here are searched after this node's own.
        tell: Called with (share done, text), at once when the job begins and then now and then.

    Returns:
        JSON: ``{"record": ...}``, or ``{"refused": why}``.
    """
    if code_version() != version:
        return json.dumps({"refused": f"{code_version()} on {platform.node()}"})
    if os.path.isdir(home):
        os.chdir(home)
    sys.path.extend(path for path in paths if path not in sys.path and os.path.exists(path))
    asked = Job.from_json(json.loads(job))
    last = time.monotonic()
    tell(0.0, "")

    def progress(share: float, text: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _REPORT_SECONDS:
            last = now
            tell(share, text)

    with _alarm(asked.budget.get("seconds")):
        return json.dumps({"record": attempt(asked, work, progress).to_json()})


@contextmanager
def _alarm(limit: float | None) -> Iterator[None]:
    """Let the system end this process if the job outlives its limit by far and nobody else has ended it."""
    if limit is None or not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, HARD_LIMIT * limit + GRACE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Mailbox:
    """Keep the last word of every job under way until the driver takes it. An actor; nothing depends on it."""

    def __init__(self) -> None:
        self._words: dict[str, tuple[float, str]] = {}
        self._news = asyncio.Event()

    async def put(self, key: str, share: float, text: str) -> None:
        """Leave a word.

        Args:
            key: Whose.
            share: Share done.
            text: What it says.
        """
        self._words[key] = (share, text)
        self._news.set()

    async def take(self) -> dict[str, tuple[float, str]]:
        """Wait for words and take them.

        Returns:
            For each key its last word.
        """
        await self._news.wait()
        self._news.clear()
        words, self._words = self._words, {}
        return words


def serve(job: str, work: str, version: str, home: str, paths: Sequence[str], key: str, mailbox: object) -> str:
    """Do one job on this node and report progress to a mailbox. The Ray task.

    Args:
        job: The job as JSON.
        work: Name of the work function.
        version: The driver's `code_version`.
        home: The driver's working directory.
        paths: Where the driver finds modules.
        key: Whose progress it is.
        mailbox: The mailbox's handle.

    Returns:
        JSON, as `serve_text`.
    """
    from ray.exceptions import RayError

    def tell(share: float, text: str) -> None:
        # A job does not fail because nobody hears of it.
        with contextlib.suppress(RayError):
            mailbox.put.remote(key, share, text)  # type: ignore[attr-defined]

    return serve_text(job, work, version, home, paths, tell)
