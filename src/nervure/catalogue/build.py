"""Rebuild the committed index: ``python -m nervure.catalogue.build``. Cards are read with `ast`, never imported."""

from __future__ import annotations

import ast
import json
import textwrap
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

from nervure.catalogue.index import INDEX
from nervure.spec import Card

SOURCE = Path(__file__).parent.parent
PACKAGES = ("nn", "init", "losses", "optim", "learn", "inspect", "kernels", "compress", "adapt", "search", "data")
PAPERS = Path(__file__).parent / "papers.json"


def read_card(tree: ast.Module, path: Path) -> Card | None:
    """Read the literal ``CARD = Card(...)`` of a file.

    Args:
        tree: The parsed file.
        path: Its path, for the error's text.

    Returns:
        The card, or None where the file has none.

    Raises:
        ValueError: If a value is no literal.
    """
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == "CARD"
            and isinstance(node.value, ast.Call)
        ):
            try:
                values = {word.arg: ast.literal_eval(word.value) for word in node.value.keywords if word.arg}
            except ValueError as error:
                raise ValueError(f"{path}: every value of CARD must be a literal ({error})") from error
            return Card(**values)
    return None


def read_claims(tree: ast.Module, card: Card, path: Path) -> list[dict[str, Any]]:
    """Read statement, minutes and seeds of the claims a card names.

    Args:
        tree: The parsed file.
        card: Its card.
        path: Its path, for the error's text.

    Returns:
        One dict a claim.

    Raises:
        ValueError: If the file lacks a claim, its docstring or its decorator.
    """
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    claims = []
    for name in card.claims:
        node = functions.get(name)
        text = ast.get_docstring(node) if node else None
        call = node.decorator_list[0] if node and node.decorator_list else None
        if not text or not isinstance(call, ast.Call):
            raise ValueError(f"{path}: the claim {name} needs a docstring and the @claim decorator")
        options = {word.arg: word.value for word in call.keywords}
        claims.append(
            {
                "name": name.replace("_", "-"),
                "statement": " ".join(text.split("\n\n")[0].split()),
                "minutes": ast.literal_eval(options["minutes"]) if "minutes" in options else 3.0,
                "seeds": ast.literal_eval(options["seeds"]) if "seeds" in options else 5,
            }
        )
    return claims


def read_example(tree: ast.Module, card: Card) -> str:
    """Read the example in the docstring of the first name a card provides.

    Args:
        tree: The parsed file.
        card: Its card.

    Returns:
        Lines of Python and what they print, from the first prompt on; empty where there are none.
    """
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in card.provides[:1]:
            text = (ast.get_docstring(node) or "").partition("\nExamples:\n")[2]
            lines = takewhile(lambda line: not line or line.startswith(" "), text.splitlines())
            code = dropwhile(lambda line: not line.lstrip().startswith(">>>"), lines)
            return textwrap.dedent("\n".join(code)).strip()
    return ""


def check_names(tree: ast.Module, card: Card, path: Path) -> None:
    """Check that a file defines what its card provides.

    Args:
        tree: The parsed file.
        card: Its card.
        path: Its path.

    Raises:
        ValueError: If a name is missing, or is the file's own name.
    """
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    missing = sorted({*card.provides, *card.entrants.values()} - defined)
    if missing:
        raise ValueError(f"{path}: the card provides {missing}, which the file does not define")
    if path.stem in card.provides:
        # `package.name` would be the function before the file is imported and the module after.
        raise ValueError(f"{path}: the card provides its own name, the file's; call the function otherwise")


def build() -> list[dict[str, Any]]:
    """Return the index: every paper, runnable or not, in the order of its number.

    Returns:
        JSON-ready values.

    Raises:
        ValueError: If two files have one id, or a card contradicts the list of papers.
    """
    papers = {paper["id"]: paper for paper in json.loads(PAPERS.read_text(encoding="utf-8"))}
    index: dict[str, dict[str, Any]] = {}
    for package in PACKAGES:
        for path in sorted((SOURCE / package).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            card = read_card(tree, path)
            if card is None:
                continue
            if card.id in index:
                raise ValueError(f"{path}: the id {card.id!r} is taken by {index[card.id]['module']}")
            paper = papers.get(card.id)
            if card.n is not None and (paper is None or paper["n"] != card.n):
                raise ValueError(f"{path}: paper {card.n} has another id in {PAPERS.name}")
            check_names(tree, card, path)
            module = ".".join(["nervure", *path.relative_to(SOURCE).with_suffix("").parts])
            values = {**card.to_json(), "title": card.title}
            for name in ("year", "link"):
                values[name] = values[name] or (paper[name] if paper else None)
            claims = read_claims(tree, card, path)
            index[card.id] = {
                "card": values, "module": module, "claims": claims, "example": read_example(tree, card)
            }  # fmt: skip
    for paper in papers.values():
        if paper["id"] not in index:
            index[paper["id"]] = {"card": Card(**paper).to_json(), "module": None, "claims": []}
    return sorted(
        index.values(), key=lambda value: (value["card"]["n"] is None, value["card"]["n"], value["card"]["id"])
    )


def text() -> str:
    """Return the index as the committed text, one paper a line."""
    lines = ",\n".join(json.dumps(value, ensure_ascii=False, sort_keys=True) for value in build())
    return f"[\n{lines}\n]\n"


if __name__ == "__main__":
    INDEX.write_text(text(), encoding="utf-8")
