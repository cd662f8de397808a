"""The methods of 294 neural-network papers on any PyTorch network.

Importing this package loads no torch; the packages with the methods do, on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
PACKAGES = frozenset(
    {
        "adapt",
        "app",
        "arena",
        "catalogue",
        "compress",
        "connect",
        "core",
        "data",
        "feed",
        "init",
        "inspect",
        "kernels",
        "learn",
        "losses",
        "nn",
        "optim",
        "report",
        "run",
        "search",
        "spec",
        "stats",
        "store",
        "testing",
        "zoo",
    }
)


def __getattr__(name: str) -> Any:
    """Import a package of nervure on its first use.

    Raises:
        AttributeError: If there is no such package.
    """
    if name in PACKAGES:
        return importlib.import_module(f"nervure.{name}")
    raise AttributeError(f"module 'nervure' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(PACKAGES | {"__version__"})
