import dataclasses
import random

import pytest

from nervure.catalogue import entries
from nervure.feed import Ranker, matches, twin
from nervure.feed.rank import _own, words
from nervure.spec import FAMILIES, Paper


def paper(title, summary="", **more):
    return Paper(
        **{"id": "link:1", "source": "", "link": "https://example.org/1", "title": title, "summary": summary, **more}
    )


# Ids of papers of known families that nobody wrote down with the ranking in mind: titles of the catalogue's own cards
# with half of the words of their summaries left out.
def halved(entry, generator):
    kept = [word for word in entry.card["summary"].split() if generator.random() < 0.5]
    return paper("a paper", " ".join(kept))


def test_half_a_summary_finds_its_family_most_of_the_time():
    generator = random.Random(0)
    some = generator.sample(list(entries().values()), 30)
    found = [Ranker(()).place(halved(entry, generator)).family == entry.card["family"] for entry in some]
    assert sum(found) >= 24  # drawn at random, one in seven: 4


@pytest.mark.parametrize(
    ("title", "summary", "family"),
    [
        ("Sparse masks at birth", "We prune weights before training and keep the winning ticket.", "compress"),
        ("Remembering old tasks", "Continual learning without catastrophic forgetting of earlier tasks.", "adapt"),
        ("Wide networks as kernels", "The neural tangent kernel of an infinitely wide network.", "kernels"),
    ],
)
def test_families(title, summary, family):
    assert Ranker(()).place(paper(title, summary)).family == family


def test_a_paper_nobody_knows_a_word_of():
    placed = Ranker(["ewc"]).place(paper("зззз", "qqqq wwww"))
    assert (placed.family, placed.score) == ("", 0)


def test_what_the_user_runs_comes_first():
    pruning = paper("Lottery tickets", "Winning tickets found by iterative magnitude pruning and rewinding.")
    forgetting = paper("Forgetting", "Catastrophic forgetting in continual learning, elastic weights, Fisher.")
    for runs, first in ((["lottery-ticket"], pruning), (["ewc"], forgetting)):
        ranker = Ranker(runs)
        assert max((pruning, forgetting), key=lambda one: ranker.place(one).score) is first
    assert Ranker(["no-such", "x"]).place(pruning) == Ranker(()).place(pruning)


def test_votes_count_up_to_a_point():
    scores = [Ranker(()).place(paper("Pruning", votes=votes)).score for votes in (None, 0, 1, 30, 500, 10**8)]
    assert scores[0] == scores[1] < scores[2] < scores[3] < scores[4] == scores[5]
    assert scores[5] - scores[0] == pytest.approx(0.2, abs=2e-6)


def test_a_score_is_a_share():
    for entry in list(entries().values())[:12]:
        assert _own(entry.id) > 0
        own = paper(entry.card["title"], f"{entry.card['summary']} {' '.join(entry.card['tags'])}", votes=10**6)
        placed = Ranker([entry.id]).place(own)
        assert 0.7 < placed.score <= 1
        assert placed.family in FAMILIES


def test_what_has_nothing_to_do_with_networks_comes_last():
    near = paper("Fine-tuning", "Low-rank adapters change few weights of a large language model and prune the rest.")
    far = paper("Terns", "Arctic terns with tags over ten years: wind explains the routes they choose over the ocean.")
    assert Ranker(()).place(near).score > Ranker(()).place(far).score
    assert Ranker(()).place(far).score < 0.15


def test_placing_changes_nothing_else():
    before = paper("Pruning", "masks", votes=3, published="2026-01-01T00:00:00Z")
    after = Ranker(()).place(before)
    assert dataclasses.replace(after, family="", score=0.0) == before


def test_hostile_words_are_only_words():
    hostile = paper('" OR 1=1; DROP TABLE papers; -- NEAR(a b) title:x *', 'AND OR NOT "unbalanced ( ) ^ {}' * 50)
    assert 0 <= Ranker(()).place(hostile).score <= 1
    assert Ranker(()).place(paper("x " * 250, "word " * 1600)).score >= 0


def test_what_the_catalogue_has_is_known():
    entry = entries()["lottery-ticket"]
    assert twin(paper("Another title", link="https://arxiv.org/abs/1803.03635")) is entry
    assert twin(paper("the lottery ticket hypothesis - finding SPARSE trainable neural networks")) is entry
    assert twin(paper("The Lottery Ticket Hypothesis")) is None
    assert twin(paper("Another title", link="https://arxiv.org/abs/2699.00001")) is None


def test_matching():
    one = paper("Pruning Transformers", "Masks of attention-heads für alle.")
    for query in ("", "prun", "PRUNING heads", "attention", "transformers, masks", "FÜR"):
        assert matches(query, one)
    for query in ("runing", "pruning graphs", "head masking"):
        assert not matches(query, one)
    assert words("A-b_c, dÉ!") == ["a", "b_c", "dé"]
