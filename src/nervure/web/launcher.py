"""Start catalogue claims and built-in comparisons in processes of their own, one after the other, and follow them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shlex
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nervure._kit import CouldNotRun, UnknownId, UsageError, seconds_text
from nervure.app.library import Setting
from nervure.arena.contest import CONTESTS
from nervure.catalogue import entries
from nervure.spec import Job

State = Literal["waiting", "running", "done", "could not run", "stopped"]
_MOST_WAITING = 8
_MOST_KEPT = 50
_LAST_LINES = 20
# Outcomes "holds" and "does not hold" are both a run that was done.
_DONE = (0, 1)


@dataclass
class Started:
    """Follow one run that was started from a page.

    Args:
        id: A random name.
        title: What runs.
        words: The command's arguments after ``nervure``.
        state: Where it is.
        share: Share done, in [0, 1].
        text: What it says of itself.
        left: Estimate of the time left, in words.
        run: Id of the run in the library, once known.
        error: What it said in the end, where it could not run.
        changes: Grows with every change.
    """

    id: str
    title: str
    words: tuple[str, ...]
    state: State = "waiting"
    share: float = 0.0
    text: str = ""
    left: str = ""
    run: str = ""
    error: str = ""
    changes: int = 0
    process: asyncio.subprocess.Process | None = field(default=None, repr=False)

    @property
    def ended(self) -> bool:
        """Return whether nothing more will come."""
        return self.state not in ("waiting", "running")

    @property
    def command(self) -> str:
        """Return the command that does the same at a terminal."""
        return shlex.join(["nervure", *self.words])

    def to_json(self) -> dict[str, Any]:
        """Return what a page shows."""
        names = ("state", "share", "text", "left", "run", "error", "ended")
        return {name: getattr(self, name) for name in names}


class Launcher:
    """Run what pages ask for, one at a time, in processes that a crash or a stop cannot take the server along with.

    Args:
        store: Where records go, as ``--store`` takes it; None for the user's own.
        reports: Folder for reports.
    """

    def __init__(self, *, store: str | None, reports: Path) -> None:
        self._options = ["--report", str(reports), *(["--store", store] if store else [])]
        self._started: dict[str, Started] = {}
        self._waiting: deque[Started] = deque()
        self._work: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()

    def start(self, what: str, *, quick: bool = False) -> Started:
        """Put a run in the queue.

        Args:
            what: ``"run "`` and a claim's id, or ``"compare "`` and a comparison's name.
            quick: Rehearse.

        Returns:
            What follows it.

        Raises:
            UsageError: If the catalogue has no such claim and nervure no such comparison.
            CouldNotRun: If too many are waiting.
        """
        words = [*allowed(what), *(["--quick"] if quick else [])]
        if len(self._waiting) >= _MOST_WAITING:
            raise CouldNotRun("too many runs are waiting", try_="again when one has ended")
        started = Started(secrets.token_hex(6), what, tuple(words))
        self._started[started.id] = started
        for old in [one for one in self._started.values() if one.ended][: max(0, len(self._started) - _MOST_KEPT)]:
            del self._started[old.id]
        self._waiting.append(started)
        if self._work is None or self._work.done():
            self._work = asyncio.get_running_loop().create_task(self._serve())
        return started

    def get(self, name: str) -> Started:
        """Return a run that was started from a page.

        Args:
            name: Its id.

        Returns:
            What follows it.

        Raises:
            UnknownId: If there is none of that id.
        """
        if name not in self._started:
            raise UnknownId("no run of that name was started here", try_="the list of runs")
        return self._started[name]

    async def stop(self, name: str) -> None:
        """End a run; what it has stored is kept.

        Args:
            name: Its id.
        """
        started = self.get(name)
        if started.ended:
            return
        if started in self._waiting:
            self._waiting.remove(started)
        await self._tell(started, state="stopped")
        if started.process is not None:
            with contextlib.suppress(ProcessLookupError):
                started.process.terminate()

    async def close(self) -> None:
        """End everything."""
        for started in list(self._started.values()):
            await self.stop(started.id)
        if self._work is not None:
            await self._work

    async def change(self, started: Started, known: int) -> int:
        """Wait until something has changed.

        Args:
            started: What is followed.
            known: The number of changes that are known.

        Returns:
            The number of changes.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: started.changes > known)
        return started.changes

    async def _tell(self, started: Started, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(started, name, value)
        async with self._changed:
            started.changes += 1
            self._changed.notify_all()

    async def _serve(self) -> None:
        while self._waiting:
            started = self._waiting.popleft()
            try:
                await self._do(started)
            except OSError as error:
                await self._tell(started, state="could not run", error=str(error))

    async def _do(self, started: Started) -> None:
        words = [sys.executable, "-m", "nervure.cli", *started.words, *self._options, "--events"]
        pipe = asyncio.subprocess.PIPE
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = await asyncio.create_subprocess_exec(
            *words, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environment, limit=2**20
        )
        started.process = process
        await self._tell(started, state="running")
        assert process.stdout is not None
        assert process.stderr is not None
        said = asyncio.create_task(_last_lines(process.stderr))
        async for line in process.stdout:
            await self._take(started, line)
        code = await process.wait()
        last = await said
        if started.state != "stopped":
            failed = code not in _DONE
            state = "could not run" if failed else "done"
            error = last.strip() if failed else ""
            share = started.share if failed else 1.0
            await self._tell(started, state=state, error=error, share=share, left="")

    async def _take(self, started: Started, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            return  # a library printed something of its own
        if not isinstance(event, dict) or "share" not in event:
            return
        changes: dict[str, Any] = {"share": event["share"], "text": event["text"]}
        if event["seconds_left"] is not None:
            changes["left"] = f"{seconds_text(event['seconds_left'])} left"
        if event["job"] is not None and event["kind"] == "ended":
            changes["run"] = Setting.of(Job.from_json(event["job"])).id
        await self._tell(started, **changes)


def allowed(what: str) -> Sequence[str]:
    """Return the command's words for what a page may start.

    Args:
        what: ``"run "`` and a claim's id, or ``"compare "`` and a comparison's name.

    Returns:
        The words after ``nervure``.

    Raises:
        UsageError: If it is nothing of the catalogue.

    Examples:
        >>> allowed("compare similarity")
        ['compare', 'similarity']
    """
    kind, _, name = what.partition(" ")
    entry = entries().get(name.partition("/")[0])
    if kind == "run" and entry is not None and name in [f"{entry.id}/{claim['name']}" for claim in entry.claims]:
        return ["run", name]
    if kind == "compare" and name in CONTESTS:
        return ["compare", name]
    if kind == "compare" and name == "prune":
        return ["compare", "prune", "--model", "lenet-300-100", "--data", "digits"]
    raise UsageError(
        "a page starts claims of the catalogue and built-in comparisons", expected="one of them", found=what[:80]
    )


async def _last_lines(stream: asyncio.StreamReader) -> str:
    lines: deque[str] = deque(maxlen=_LAST_LINES)
    async for line in stream:
        lines.append(line.decode(errors="replace"))
    return "".join(lines)
