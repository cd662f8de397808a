"""Floor 2: the index of cards, its search, and plugins. Never imports a method to list it."""

from nervure.catalogue.index import Entry, entries, exports, family, get, resolve
from nervure.catalogue.search import search

__all__ = ["Entry", "entries", "exports", "family", "get", "resolve", "search"]
