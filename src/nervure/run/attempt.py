"""Do one job and turn whatever happens into a Record."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from nervure import __version__
from nervure._kit import Diverged, NervureError, OverBudget, UsageError
from nervure.spec import Job, Notes, Record, Status

Progress = Callable[[float, str], None]
DEFAULT_WORK = "nervure.run.attempt:measure"
# A kill is for jobs that do not ask for the time; one that reports progress ends itself at 1.
HARD_LIMIT = 3.0
_MOST_WARNINGS = 50


Work = Callable[[Job, Progress, Notes], None]


def measure(job: Job, progress: Progress, notes: Notes) -> None:
    """Do a job the usual way: ask the arena.

    Args:
        job: The job.
        progress: Called with (share done, text).
        notes: Filled as the job goes.
    """
    # Imported here, in the worker: the arena brings torch.
    from nervure.arena.measure import measure as measure_in_arena

    measure_in_arena(job, progress, notes)


def find_work(name: str) -> Work:
    """Import a work function by its name.

    Args:
        name: ``"module:function"``.

    Returns:
        The function.

    Raises:
        UsageError: If there is no such function.
    """
    module, _, attribute = name.partition(":")
    try:
        return cast(Work, getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"the work {name!r} cannot be imported: {error}", expected="module:function, importable in a new process"
        ) from error


def attempt(job: Job, work: str, progress: Progress) -> Record:
    """Do a job in this process. Every exception but an interrupt becomes a Record.

    Args:
        job: The job.
        work: Name of the work function.
        progress: Called with (share done, text).

    Returns:
        The record.
    """
    notes, status, failure = Notes(), Status.DONE, None
    started, wall, cpu = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter(), time.process_time()
    limit = job.budget.get("seconds")
    _forget_peak()

    def watched(share: float, text: str = "") -> None:
        spent = time.perf_counter() - wall
        if limit is not None and spent > limit:
            raise OverBudget("the job used up its time", expected=f"at most {limit:g} s", found=f"{spent:.1f} s")
        progress(share, text)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            find_work(work)(job, watched, notes)
        except Exception as error:  # the boundary: a job may fail in any way, and its record says how
            status, failure = _status(error), _text(error)
    texts = [*notes.warnings, *(f"{one.category.__name__}: {one.message}" for one in caught)]
    spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "peak_rss": peak_rss()}
    return Record(
        job=job,
        status=status,
        measurements=tuple(notes.measurements),
        cost={**notes.cost, **spent},
        warnings=tuple(dict.fromkeys(texts))[:_MOST_WARNINGS],
        error=failure,
        environment=environment(),
        started=started,
    )


def environment() -> dict[str, str]:
    """Describe what ran the job: versions, threads, CPU.

    Returns:
        Names and values.
    """
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else os.environ.get("OMP_NUM_THREADS", "")
    return {
        "nervure": __version__,
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "threads": str(threads),
        "cpu": _cpu(),
        "system": platform.platform(terse=True),
    }


def peak_rss() -> float:
    """Return the most memory this process held, in bytes; on Linux since the job began.

    Returns:
        The bytes; NaN where the system does not tell.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return float("nan")
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _forget_peak() -> None:
    """Let the kernel count the peak anew; where it may not, the peak is the process's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _status(error: Exception) -> Status:
    if isinstance(error, Diverged):
        return Status.DIVERGED
    return Status.OVER_BUDGET if isinstance(error, OverBudget) else Status.FAILED


def _text(error: Exception) -> str:
    """Return the error; for one that is not nervure's own also where it was raised."""
    if isinstance(error, NervureError):
        return f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error)[-12:])
    return f"{type(error).__name__}: {error}\n{trace}"
