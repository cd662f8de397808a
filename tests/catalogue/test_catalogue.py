import ast
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import nervure
from nervure import catalogue
from nervure._kit import CouldNotRun, UnknownId
from nervure.catalogue import build, index
from nervure.spec import Card, claims_of

ROOT = Path(nervure.__file__).parent
RUNNABLE = [entry.id for entry in catalogue.entries().values() if entry.runnable]


def test_the_committed_index_is_what_the_sources_say():
    assert index.INDEX.read_text(encoding="utf-8") == build.text()


def test_all_papers_are_there_once():
    numbers = [entry.card["n"] for entry in catalogue.entries().values() if entry.card["n"] is not None]
    assert len(numbers) == len(set(numbers)) == 294
    for entry in catalogue.entries().values():
        assert len(entry.card["title"]) > 3
        assert len(entry.card["summary"]) > 40


@pytest.mark.parametrize("name", RUNNABLE)
def test_cards_claims_and_names_agree_with_the_module(name):
    entry = catalogue.get(name)
    module = entry.load()
    own = json.loads(json.dumps(module.CARD.to_json()))
    assert {**own, "year": entry.card["year"], "link": entry.card["link"]} == entry.card
    assert [claim.name for claim in claims_of(module, module.CARD)] == [claim["name"] for claim in entry.claims]
    for claim, listed in zip(claims_of(module, module.CARD), entry.claims, strict=True):
        assert (claim.statement, claim.seeds) == (listed["statement"], listed["seeds"])
        assert claim.minutes == listed["minutes"]
        assert set(claim.sabotage.values()) <= {check.method for check in claim.checks}
    package = entry.module.split(".")[1]
    for public in entry.card["provides"]:
        assert getattr(getattr(nervure, package), public) is getattr(module, public)
    assert entry.card["verified"], "a runnable method says what it was tested against"


def test_search_finds_papers_by_title_tag_and_summary():
    assert catalogue.search("lottery ticket hypothesis")[0].id == "lottery-ticket"
    assert "robust-prune-init" in [entry.id for entry in catalogue.search("SNIP sensitivity")]
    assert "lottery-ticket" in [entry.id for entry in catalogue.search("winning tick")]
    assert catalogue.search('"; drop table papers; --') is not None
    assert catalogue.search("   ") == []
    assert len(catalogue.search("neural network", limit=3)) == 3


def test_every_paper_is_found_by_its_title():
    for entry in catalogue.entries().values():
        assert entry.id in [found.id for found in catalogue.search(entry.card["title"], limit=5)], entry.id


def test_ids_numbers_and_suggestions():
    assert catalogue.get("35").id == "lottery-ticket"
    with pytest.raises(UnknownId, match="lottery-ticket"):
        catalogue.get("lotery-tiket")
    planned = next(entry for entry in catalogue.entries().values() if not entry.runnable)
    with pytest.raises(CouldNotRun, match="not yet runnable"):
        planned.load()


def tree(text):
    return ast.parse(text)


def test_cards_must_be_literal_and_truthful():
    with pytest.raises(ValueError, match="must be a literal"):
        build.read_card(tree("CARD = Card(id='a', title='t' + str(1), family='train', summary='s')"), Path("x.py"))
    with pytest.raises(ValueError, match="the arena owns lr"):
        Card(id="a", title="t", family="train", summary="s", tunes={"lr": (0.1, 1.0)})
    with pytest.raises(ValueError, match="family 'prune' is not one of"):
        Card(id="a", title="t", family="prune", summary="s")
    with pytest.raises(ValueError, match="expected lower-case"):
        Card(id="A b", title="t", family="train", summary="s")
    card = Card(id="a", title="t", family="train", summary="s", provides=("Gone",), claims=("gone",))
    with pytest.raises(ValueError, match="does not define"):
        build.check_names(tree("x = 1"), card, Path("x.py"))
    own_name = Card(id="a", title="t", family="train", summary="s", provides=("x",))
    with pytest.raises(ValueError, match="its own name"):
        build.check_names(tree("def x(): pass"), own_name, Path("x.py"))
    with pytest.raises(ValueError, match="needs a docstring"):
        build.read_claims(tree("def gone(ctx): pass"), card, Path("x.py"))


class FakePoint:
    name = "mine"

    def __init__(self, values):
        self.values = values

    def load(self):
        return lambda: self.values


def plugin(monkeypatch, values):
    index.plugins.cache_clear()
    monkeypatch.setattr(metadata, "entry_points", lambda group: [FakePoint(values)])


@pytest.fixture(autouse=True)
def _forget_plugins():
    yield
    index.plugins.cache_clear()


def test_plugins_are_found_by_id(monkeypatch):
    card = Card(id="my-pruner", title="Mine", family="compress", summary="My own pruner.", provides=("Mine",)).to_json()
    plugin(monkeypatch, [{"card": card, "module": "my.module", "claims": []}])
    assert catalogue.get("my-pruner").module == "my.module"


def test_plugins_may_not_take_an_id_or_be_malformed(monkeypatch):
    card = Card(id="ewc", title="Mine", family="compress", summary="s").to_json()
    plugin(monkeypatch, [{"card": card, "module": "m", "claims": []}])
    with pytest.raises(CouldNotRun, match="adds 'ewc', which exists"):
        catalogue.get("no-such-paper")
    plugin(monkeypatch, [{"wrong": 1}])
    with pytest.raises(CouldNotRun, match="plugin mine cannot be read"):
        catalogue.get("no-such-paper")


@pytest.mark.parametrize("words", [["find", "prune"], ["list"], ["show", "ewc"]])
def test_listing_loads_no_torch(words):
    code = f"import sys; from nervure.cli.main import run; run({words!r}); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_importing_nervure_is_light():
    spent = []
    for _ in range(5):  # the least of a few: another process may be at work
        words = [sys.executable, "-X", "importtime", "-c", "import nervure"]
        lines = subprocess.run(words, capture_output=True, text=True).stderr.splitlines()
        loaded = [line.rpartition("|")[2].strip() for line in lines]
        assert not {"torch", "numpy", "scipy", "sqlalchemy", "matplotlib"}.intersection(loaded)
        spent.append(int(next(line.split("|")[1] for line in lines if line.endswith("| nervure"))))
    assert min(spent) < 50_000
