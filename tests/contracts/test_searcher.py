"""Every searcher on a small space."""

from __future__ import annotations

from nervure import catalogue
from nervure.search.space import Range
from nervure.testing import SearcherContract

SPACE = {"a": Range(0.1, 1.0), "b": Range(0.1, 1.0)}
EXAMPLES = {"pbt": lambda kind, seed: kind(SPACE, members=4, seed=seed)}

for _entry in catalogue.family("searcher"):
    _name = f"Test{_entry.card['provides'][0]}"
    globals()[_name] = type(
        _name,
        (SearcherContract,),
        {
            "__module__": __name__,
            "make": lambda self, *, seed, entry=_entry: EXAMPLES[entry.id](catalogue.resolve(entry.id), seed),
        },
    )
