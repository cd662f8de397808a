"""Full-text search over titles, summaries and tags with SQLite FTS5, in memory."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing

from nervure.catalogue.index import Entry, entries, plugins

# Title and id count most, then tags, then the summary.
_WEIGHTS = "10.0, 8.0, 4.0, 1.0"
# SQLite bounds the depth of an expression; an abstract has fewer.
_MOST_WORDS = 400


def search(query: str, *, limit: int = 10) -> list[Entry]:
    """Return the papers that fit a query best.

    Every word may end anywhere ("prun" finds "pruning"). Papers with all words come first,
    then those with any.

    Args:
        query: Words.
        limit: How many at most, at least 1.

    Plugins are searched too when the index itself has nothing.

    Returns:
        The entries, best first; runnable ones first among equals.
    """
    words = re.findall(r"\w+", query.lower())
    if not words:
        return []
    return _search(words, entries(), limit) or _search(words, plugins(), limit)


def nearest(text: str, *, limit: int = 5) -> list[tuple[Entry, float]]:
    """Return the papers of the index most alike a text, such as another paper's title and abstract.

    Args:
        text: Any text; what is very common in the index counts little.
        limit: How many at most.

    Returns:
        (entry, BM25 score), best first; higher is more alike, and scores of different texts are not comparable.

    Examples:
        >>> nearest("binary masks find sparse subnetworks of a random network", limit=1)[0][0].card["family"]
        'compress'
    """
    words = list(dict.fromkeys(re.findall(r"\w{3,}", text.lower())))[:_MOST_WORDS]
    if not words:
        return []
    known = entries()
    with closing(_base(known)) as base:
        found = _matches(base, " OR ".join(f'"{word}"' for word in words), limit)
    return [(known[key], -score) for key, score in found]


def _search(words: list[str], known: dict[str, Entry], limit: int) -> list[Entry]:
    found: dict[str, float] = {}
    with closing(_base(known)) as base:
        for join, handicap in ((" AND ", 0.0), (" OR ", 1000.0)):
            for key, score in _matches(base, join.join(f'"{word}"*' for word in words), limit):
                found.setdefault(key, handicap + score)
    ranked = sorted(found, key=lambda key: (round(found[key], 1), not known[key].runnable))
    return [known[key] for key in ranked[:limit]]


def _base(known: dict[str, Entry]) -> sqlite3.Connection:
    base = sqlite3.connect(":memory:")
    base.execute("create virtual table papers using fts5(title, id, tags, summary, key unindexed, tokenize='porter')")
    base.executemany(
        "insert into papers values (?, ?, ?, ?, ?)",
        [
            (
                entry.card["title"],
                f"{entry.id.replace('-', ' ')} {' '.join(entry.card['provides'])}",
                " ".join([*entry.card["tags"], entry.card["family"], str(entry.card["protocol"] or "")]),
                entry.card["summary"],
                entry.id,
            )
            for entry in known.values()
        ],
    )
    return base


def _matches(base: sqlite3.Connection, match: str, limit: int) -> list[tuple[str, float]]:
    return base.execute(
        f"select key, bm25(papers, {_WEIGHTS}) from papers where papers match ? order by 2 limit ?", (match, limit)
    ).fetchall()
