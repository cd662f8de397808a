"""Floor 2: the index of cards, its search, and plugins. Never imports a method to list it."""

from nervure.catalogue.index import Entry, entries, exports, family, get, published, resolve
from nervure.catalogue.search import nearest, search

__all__ = ["Entry", "entries", "exports", "family", "get", "nearest", "published", "resolve", "search"]
