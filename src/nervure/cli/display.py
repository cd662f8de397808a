"""Progress and numbers on a terminal."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nervure._kit import seconds_text

if TYPE_CHECKING:
    from nervure.run import Event


@contextlib.contextmanager
def progress(title: str, *, silent: bool, events: bool = False) -> Iterator[Callable[[Event], None]]:
    """Show a bar with the time left on a terminal, or a line now and then where there is none.

    Args:
        title: What is done.
        silent: Show nothing.
        events: Print every event on standard output as a line of JSON instead.

    Yields:
        What to call with every event.
    """
    console = Console(stderr=True)
    if events:
        yield lambda event: print(json.dumps(event.to_json()), flush=True)
        return
    if silent:
        yield lambda event: None
        return
    if not console.is_terminal:
        yield _Lines(title)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=1.0, left="starting")

        def show(event: Event) -> None:
            left = f"{seconds_text(event.seconds_left)} left" if event.seconds_left is not None else "starting"
            bar.update(task, completed=event.share, left=f"{event.share:.0%}  {left}  {event.text[:40]}")
            if event.record is not None and event.record.error:
                bar.console.print(f"seed {event.record.job.seed}: {event.record.error.splitlines()[0]}")

        yield show


class _Lines:
    """Print a line at every tenth of the way."""

    def __init__(self, title: str) -> None:
        self.title, self.printed = title, -1

    def __call__(self, event: Event) -> None:
        tenth = int(event.share * 10)
        if tenth > self.printed:
            self.printed = tenth
            left = f", {seconds_text(event.seconds_left)} left" if event.seconds_left is not None else ""
            print(f"{self.title}: {event.share:.0%} done{left}", file=sys.stderr, flush=True)


def number(value: float) -> str:
    """Return a number with four significant digits."""
    return f"{value:.4g}" if math.isfinite(value) else "n/a"
