"""Where a new paper belongs, and how much it should matter to this user."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from dataclasses import replace

from nervure.catalogue import Entry, entries, nearest
from nervure.spec import Paper, arxiv_id

# What the user runs counts most, then how near the paper is to the catalogue at all, then what others think of it.
INTEREST, NEARNESS, VOTES = 0.5, 0.3, 0.2
# This many votes and more count in full.
MANY_VOTES = 500
# Papers of the catalogue give their nearest other card 0.10 to 0.35 of its own score, nine in ten less than 0.27: this
# share and more counts as fully alike. A text on birds or bread reaches 0.1.
ALIKE = 0.3
_NEIGHBOURS = 5


class Ranker:
    r"""Give papers a family and a score.

    With r(d) the BM25 score of card d for the paper's words, divided by the score card d has for its own words, and
    s(d) = min(1, r(d) / 0.3),

    .. math:: score = 0.5 max_{d run} s(d) + 0.3 max_d s(d) + 0.2 min(1, log(1 + votes) / log(1 + 500)).

    A share of a card's own score can be compared between papers, which BM25 itself cannot. The family is the one with
    the most BM25 among the five nearest papers.

    Args:
        runs: Ids of the papers the user has run.

    Examples:
        >>> paper = Paper(id="arxiv:1", source="", title="Sparse subnetworks found by pruning masks", link="")
        >>> plain, fan = Ranker(()).place(paper), Ranker(["lottery-ticket"]).place(paper)
        >>> plain.family, fan.score > plain.score
        ('compress', True)
    """

    def __init__(self, runs: Iterable[str]) -> None:
        self._runs = frozenset(runs) & frozenset(entries())

    def place(self, paper: Paper) -> Paper:
        """Return a paper with its family and score.

        Args:
            paper: The paper.

        Returns:
            A copy.
        """
        near = nearest(f"{paper.title} {paper.summary}", limit=len(entries()))
        families: dict[str, float] = {}
        for entry, score in near[:_NEIGHBOURS]:
            families[entry.card["family"]] = families.get(entry.card["family"], 0.0) + score
        nearness = max((_likeness(entry.id, score) for entry, score in near[:_NEIGHBOURS]), default=0.0)
        interest = max((_likeness(entry.id, score) for entry, score in near if entry.id in self._runs), default=0.0)
        votes = min(1.0, math.log1p(paper.votes or 0) / math.log1p(MANY_VOTES))
        return replace(
            paper,
            family=max(families, key=lambda name: families[name], default=""),
            score=round(INTEREST * interest + NEARNESS * nearness + VOTES * votes, 6),
        )


def twin(paper: Paper) -> Entry | None:
    """Return the paper of the catalogue that this one is, if there is one.

    Args:
        paper: The paper.

    Returns:
        The entry with the same arXiv identifier or the same title.
    """
    by_name, by_title = _catalogue()
    return by_name.get(arxiv_id(paper.link)) or by_title.get(_letters(paper.title))


def matches(query: str, paper: Paper) -> bool:
    """Return whether a paper has every word of a query. A word may end anywhere: "prun" finds "pruning".

    Args:
        query: Words.
        paper: The paper.

    Returns:
        True if all are in its title or summary; also for no words.

    Examples:
        >>> paper = Paper(id="arxiv:1", source="", title="Pruning at initialisation", link="")
        >>> matches("init prun", paper), matches("pruning transformers", paper)
        (True, False)
    """
    there = set(words(f"{paper.title} {paper.summary}"))
    return all(any(word.startswith(one) for word in there) for one in words(query))


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"\w+", text.lower())


def _likeness(key: str, score: float) -> float:
    own = _own(key)
    return min(1.0, score / (ALIKE * own)) if own > 0 else 0.0


@functools.cache
def _own(key: str) -> float:
    """Return the BM25 score of a card for its own words, about the most that any text can give it."""
    card = entries()[key].card
    text = " ".join([card["title"], card["summary"], *card["tags"], key, *card["provides"], card["family"]])
    return next((score for entry, score in nearest(text, limit=len(entries())) if entry.id == key), 0.0)


@functools.cache
def _catalogue() -> tuple[dict[str, Entry], dict[str, Entry]]:
    known = entries().values()
    by_name = {name: entry for entry in known if (name := arxiv_id(entry.card["link"] or ""))}
    return by_name, {_letters(entry.card["title"]): entry for entry in known}


def _letters(title: str) -> str:
    return "".join(words(title))
