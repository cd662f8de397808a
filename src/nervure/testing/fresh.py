"""Run a contract's method in a new process, forked off one that has imported torch and holds nothing else."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch

from nervure.core.factory import load_factory
from nervure.testing.checks import Broken, digest

ANSWER, FAILURE = "answer.json", "failure.txt"


class Nursery:
    """Keep one process with other hash seeds and memory that has torch imported, and fork a new one for each question.

    Importing torch takes longer than most contracts. Where the system cannot fork, each question waits for it.
    """

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONHASHSEED": "random"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nervure.testing.fresh"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self._lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, spec: str, folder: Path) -> None:
        """Have a contract's answers written.

        Args:
            spec: ``path.py:Class``.
            folder: Where to.

        Raises:
            Broken: If the new process fails.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps([spec, str(folder)]) + "\n")
            self._process.stdin.flush()
            ended = self._process.stdout.readline().strip()
        if ended != "0":
            failure = folder / FAILURE
            told = failure.read_text(encoding="utf-8") if failure.exists() else f"it ended with {ended or 'nothing'}"
            raise Broken(f"a new process failed: {told[-1500:]}")

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()


@functools.cache
def nursery() -> Nursery:
    """Return this process's own."""
    return Nursery()


def answers(contract: Any, folder: Path) -> dict[str, dict[str, str]]:
    """Ask a contract for its results in a process with other hash seeds and memory.

    Args:
        contract: A contract; its class must be importable from its file by its name.
        folder: An empty folder; what the contract saved there is visible to the other process.

    Returns:
        Case -> what -> digest.
    """
    kind = type(contract)
    nursery().ask(f"{contract.source()}:{kind.__name__}", folder)
    found: dict[str, dict[str, str]] = json.loads((folder / ANSWER).read_text())
    return found


def write(spec: str, folder: Path) -> None:
    """Write the digests of all cases of a contract.

    Args:
        spec: ``path.py:Class``.
        folder: Where the answer goes and saved files lie.
    """
    torch.set_num_threads(1)
    torch.manual_seed(987)  # unlike the parent: a result must not depend on the global generator
    contract = load_factory(spec)()
    found = {
        case: {what: digest(value) for what, value in contract.fresh(case, folder).items()}
        for case in contract.fresh_cases()
    }
    (folder / ANSWER).write_text(json.dumps(found))


def attempt(spec: str, folder: Path) -> int:
    """Write the digests, or what went wrong.

    Args:
        spec: As in `write`.
        folder: As in `write`.

    Returns:
        0 or 1.
    """
    try:
        write(spec, folder)
    except BaseException:  # the boundary of the process: whatever it was, the asking one tells it
        (folder / FAILURE).write_text(traceback.format_exc(), encoding="utf-8")
        return 1
    return 0


def serve() -> None:
    """Answer the questions on standard input, each in a process of its own, until it is closed."""
    import nervure.zoo  # noqa: F401  # what every contract imports anyway

    torch.set_num_threads(1)
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a method prints is no answer
    for line in sys.stdin:
        spec, place = json.loads(line)
        folder = Path(place)
        if hasattr(os, "fork"):
            child = os.fork()
            if child == 0:
                os._exit(attempt(spec, folder))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        else:
            words = [sys.executable, "-m", "nervure.testing.fresh", spec, place]
            code = subprocess.run(words, check=False).returncode
        print(code, file=out, flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(attempt(sys.argv[1], Path(sys.argv[2])))
    serve()
