"""The strict table of pairs a method refuses: method -> zoo model -> part of the reason."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from nervure import zoo
from nervure._kit import BadData

Table = Mapping[str, Mapping[str, str]]


def read(path: Path) -> Table:
    """Read a table of refusals.

    Args:
        path: A TOML file with one table for each method.

    Returns:
        Method -> zoo model -> part of the reason.

    Raises:
        BadData: If it names an unknown zoo model or gives no reason.
    """
    found: dict[str, dict[str, str]] = tomllib.loads(path.read_text(encoding="utf-8"))
    known = set(zoo.names())
    for method, pairs in found.items():
        for model, reason in pairs.items():
            if model not in known or not isinstance(reason, str) or not reason.strip():
                raise BadData(
                    f"{path.name}: {method}.{model} is no pair with a reason", expected="a zoo model", found=model
                )
    return found
