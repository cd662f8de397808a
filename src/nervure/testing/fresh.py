"""Run a contract's method in a new process: ``python -m nervure.testing.fresh <file:class> <folder>``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from nervure.core.factory import load_factory
from nervure.testing.checks import Broken, digest

ANSWER = "answer.json"


def answers(contract: Any, folder: Path) -> dict[str, dict[str, str]]:
    """Ask a contract for its results in a process with other hash seeds and memory.

    Args:
        contract: A contract; its class must be importable from its file by its name.
        folder: An empty folder; what the contract saved there is visible to the other process.

    Returns:
        Case -> what -> digest.

    Raises:
        Broken: If the other process fails.
    """
    kind = type(contract)
    spec = f"{contract.source()}:{kind.__name__}"
    command = [sys.executable, "-m", "nervure.testing.fresh", spec, str(folder)]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONHASHSEED": "random"}
    )
    if ended.returncode:
        raise Broken(f"a new process failed: {ended.stderr[-1500:]}")
    found: dict[str, dict[str, str]] = json.loads((folder / ANSWER).read_text())
    return found


def main(spec: str, folder: Path) -> None:
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


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
