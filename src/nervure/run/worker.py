"""A worker process: jobs come in as lines of JSON, progress and records go out the same way."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from typing import TextIO

from nervure.run.attempt import attempt
from nervure.spec import Job

LOOK_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1
# More often than this nobody can read.
_REPORT_SECONDS = 0.1


def serve() -> None:
    """Do jobs until the parent closes the pipe, or is gone. Started by `nervure.run.local`."""
    parent, work = int(sys.argv[1]), sys.argv[2]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent)
    faulthandler.enable()
    source, sink = _take_pipes()
    for line in source:
        job = Job.from_json(json.loads(line))
        _send(sink, {"began": job.id})
        last = [0.0]

        def progress(share: float, text: str = "", last: list[float] = last) -> None:
            now = time.monotonic()
            if now - last[0] >= _REPORT_SECONDS:
                last[0] = now
                _send(sink, {"share": share, "text": text})

        _send(sink, {"record": attempt(job, work, progress).to_json()})


def die_with(parent: int) -> None:
    """End this process, and what it started, soon after its parent ends, however that came about.

    Args:
        parent: The parent's process number.
    """
    if hasattr(os, "fork"):
        _leave_guard()
    if sys.platform == "linux":
        # At once, even if a long computation holds the interpreter; the thread is for other systems.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), name="nervure-watch", daemon=True).start()


def _leave_guard() -> None:
    """Fork a process that outlives this one just long enough to end what its jobs have started."""
    worker = os.getpid()
    if os.fork():
        return
    # The pipes are not the guard's to hold open. It is in the worker's group, and so ends itself with the rest.
    os.closerange(0, 3)
    while os.getppid() == worker:
        time.sleep(LOOK_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os._exit(1)


def _take_pipes() -> tuple[TextIO, TextIO]:
    """Keep the pipes for the protocol: what a job prints goes to the log, and it has nothing to read."""
    source, sink = os.fdopen(os.dup(0), encoding="ascii"), os.fdopen(os.dup(1), "w", encoding="ascii")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return source, sink


def _send(sink: TextIO, message: dict[str, object]) -> None:
    sink.write(json.dumps(message) + "\n")
    sink.flush()
