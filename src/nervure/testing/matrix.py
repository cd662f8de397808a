"""Write the support matrix: ``python -m nervure.testing.matrix [expected.toml] [support-matrix.md]``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from nervure import catalogue, zoo
from nervure.spec import PROTOCOLS
from nervure.testing import table

# Protocols whose contracts run on the whole zoo; the others bring their own problems, or a few small models.
WHOLE_MODEL = ("pruner", "channel-pruner", "initialiser", "kernel", "continual-learner", "training-rule")
SOURCE, TARGET = Path("tests/contracts/expected.toml"), Path("docs/support-matrix.md")


def methods() -> list[tuple[str, str]]:
    """Return (protocol, name) of every method under a contract with the zoo; entrants of ``compare`` by their own."""
    return [
        (protocol, name)
        for protocol in PROTOCOLS
        if protocol in WHOLE_MODEL
        for entry in catalogue.family(protocol)
        for name in (sorted(entry.card["entrants"]) or [entry.id])
    ]


def markdown(refused: table.Table, rows: Iterable[tuple[str, str]]) -> str:
    """Return the matrix as Markdown.

    Args:
        refused: The table of refusals.
        rows: (protocol, name) of the methods.

    Returns:
        The text.

    Examples:
        >>> text = markdown({"snip": {"lstm": "no hook"}}, [("pruner", "snip")])
        >>> "| snip | pruner | yes |" in text, "- **snip** on lstm: no hook" in text
        (True, True)
    """
    names = zoo.names()
    lines = [
        "# Support matrix",
        "",
        "Every method on every model of the zoo, as the contract tests find it. A refused pair raises `Unsupported`;",
        "written by `python -m nervure.testing.matrix` from `tests/contracts/expected.toml`.",
        "",
        f"| method | protocol | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    reasons = []
    for protocol, method in rows:
        pairs = refused.get(method, {})
        cells = ["refused" if name in pairs else "yes" for name in names]
        lines.append(f"| {method} | {protocol} | {' | '.join(cells)} |")
        reasons += [f"- **{method}** on {name}: {pairs[name]}" for name in names if name in pairs]
    return "\n".join([*lines, "", "## Why a pair is refused", "", *(reasons or ["None is."])]) + "\n"


def main(source: Path = SOURCE, target: Path = TARGET) -> None:
    """Write the matrix.

    Args:
        source: The table of refusals.
        target: The Markdown file.
    """
    target.write_text(markdown(table.read(source), methods()), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
