"""Lazy attributes (PEP 562) and optional packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from nervure._kit.errors import MissingExtra


def lazy_attributes(package: str, where: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` that import a name's module on its first use.

    Args:
        package: The package's own ``__name__``.
        where: For each public name, the module that defines it.

    Returns:
        The two functions, to be assigned at module level.
    """

    def __getattr__(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(where[name]), name)

    def __dir__() -> list[str]:
        return sorted(where)

    return __getattr__, __dir__


def require(package: str, *, extra: str) -> ModuleType:
    """Import an optional package or say which extra brings it.

    Args:
        package: The import name.
        extra: The name of nervure's extra that installs it.

    Returns:
        The module.

    Raises:
        MissingExtra: If the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtra(package, extra) from error
