"""Full-text search over titles, summaries and tags with SQLite FTS5, in memory."""

from __future__ import annotations

import re
import sqlite3

from nervure.catalogue.index import Entry, entries, plugins

# Title and id count most, then tags, then the summary.
_WEIGHTS = "10.0, 8.0, 4.0, 1.0"


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


def _search(words: list[str], known: dict[str, Entry], limit: int) -> list[Entry]:
    with sqlite3.connect(":memory:") as base:
        base.execute(
            "create virtual table papers using fts5(title, id, tags, summary, key unindexed, tokenize='porter')"
        )
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
        found: dict[str, float] = {}
        for join, handicap in ((" AND ", 0.0), (" OR ", 1000.0)):
            rows = base.execute(
                f"select key, bm25(papers, {_WEIGHTS}) from papers where papers match ? order by 2 limit ?",
                (join.join(f'"{word}"*' for word in words), limit),
            )
            for key, score in rows:
                found.setdefault(key, handicap + score)
    base.close()
    ranked = sorted(found, key=lambda key: (round(found[key], 1), not known[key].runnable))
    return [known[key] for key in ranked[:limit]]
