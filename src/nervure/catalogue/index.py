"""Read the committed index of cards and resolve ids to methods."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nervure._kit import CouldNotRun, UnknownId, did_you_mean, lazy_attributes

INDEX = Path(__file__).parent.parent / "_index.json"
PUBLISHED = Path(__file__).parent / "published.json"
PLUGINS = "nervure.cards"


@dataclass(frozen=True)
class Entry:
    """Hold one paper of the catalogue.

    Args:
        card: The card's fields, as in `nervure.spec.Card`.
        module: Module that defines the method, or None while the paper is not yet runnable.
        claims: For each claim its name, statement, minutes and seeds.
        example: The example in the method's docstring: lines of Python and what they print.
    """

    card: Mapping[str, Any]
    module: str | None
    claims: tuple[Mapping[str, Any], ...] = ()
    example: str = ""

    @property
    def id(self) -> str:
        """Return the card's id."""
        return str(self.card["id"])

    @property
    def runnable(self) -> bool:
        """Return whether nervure has the method."""
        return self.module is not None

    def load(self) -> ModuleType:
        """Import the method's module; this is the moment torch is loaded.

        Returns:
            The module.

        Raises:
            CouldNotRun: If the paper is not yet runnable.
        """
        if self.module is None:
            raise CouldNotRun(
                f"{self.id} is in the catalogue but not yet runnable", try_="nervure list --runnable for those that are"
            )
        return importlib.import_module(self.module)


@functools.cache
def published() -> dict[str, dict[str, Any]]:
    """Return what the claims came to when the makers of this version measured them in full.

    Returns:
        Claim's id -> ``verdict`` (as `nervure.spec.Verdict.to_json` has it), ``environment``, ``started``, ``seconds``.
    """
    values = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return {value["verdict"]["claim"]: value for value in values}


def _entry(value: Mapping[str, Any]) -> Entry:
    return Entry(value["card"], value["module"], tuple(value["claims"]), value.get("example", ""))


@functools.cache
def entries() -> dict[str, Entry]:
    """Return every entry of the index by id."""
    return {value["card"]["id"]: _entry(value) for value in json.loads(INDEX.read_text(encoding="utf-8"))}


@functools.cache
def plugins() -> dict[str, Entry]:
    """Return the entries that installed packages add.

    A plugin names, under the entry-point group ``nervure.cards``, a function that returns a list of values of
    the index's form: ``{"card": {...}, "module": "package.module", "claims": [...]}``.

    Raises:
        CouldNotRun: If a plugin's entry is not of that form or takes an id that exists.
    """
    from importlib import metadata  # 15 ms, and only needed where the index has no answer

    found: dict[str, Entry] = {}
    for point in metadata.entry_points(group=PLUGINS):
        try:
            added = [_entry(value) for value in point.load()()]
        except Exception as error:
            raise CouldNotRun(
                f"the plugin {point.name} cannot be read", found=f"{type(error).__name__}: {error}", try_="updating it"
            ) from error
        for entry in added:
            if entry.id in found or entry.id in entries():
                raise CouldNotRun(f"the plugin {point.name} adds {entry.id!r}, which exists", try_="another id")
            found[entry.id] = entry
    return found


def get(name: str) -> Entry:
    """Return the entry of an id; plugins are looked at only when the index has no such id.

    Args:
        name: The card's id, or the paper's number.

    Returns:
        The entry.

    Raises:
        UnknownId: With the nearest ids.

    Examples:
        >>> get("ewc").card["family"]
        'adapt'
    """
    known = entries()
    if name in known:
        return known[name]
    if name.isdigit():
        numbered = [entry for entry in known.values() if entry.card["n"] == int(name)]
        if numbered:
            return numbered[0]
    if name in plugins():
        return plugins()[name]
    near = did_you_mean(name, [*known, *plugins()])
    raise UnknownId(f"there is no paper {name!r}", try_=f"{' or '.join(near)}" if near else f"nervure find {name!r}")


def family(protocol: str) -> list[Entry]:
    """Return the runnable entries whose method meets a protocol, plugins included.

    Args:
        protocol: One of `nervure.spec.PROTOCOLS`.

    Returns:
        The entries.
    """
    everything = [*entries().values(), *plugins().values()]
    return [entry for entry in everything if entry.runnable and entry.card["protocol"] == protocol]


def resolve(name: str) -> Any:
    """Return the method itself: the first name its card provides.

    Args:
        name: The card's id.

    Returns:
        The class or function.
    """
    entry = get(name)
    return getattr(entry.load(), entry.card["provides"][0])


def exports(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a method package, fed from the index.

    Args:
        package: The package's short name, such as ``"compress"``.

    Returns:
        The two functions.
    """
    prefix = f"nervure.{package}."
    where = {
        name: entry.module
        for entry in entries().values()
        if entry.module and entry.module.startswith(prefix)
        for name in entry.card["provides"]
    }
    return lazy_attributes(f"nervure.{package}", where)
