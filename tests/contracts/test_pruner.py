"""Every pruner of `compare` on every model of the zoo."""

from __future__ import annotations

from pathlib import Path

from nervure import catalogue
from nervure.testing import PrunerContract, table

TABLE = table.read(Path(__file__).with_name("expected.toml"))


def _contract(entry: catalogue.Entry, name: str) -> type[PrunerContract]:
    return type(
        f"Test{entry.card['entrants'][name].title().replace('_', '')}",
        (PrunerContract,),
        {
            "__module__": __name__,
            "method": lambda self: getattr(entry.load(), entry.card["entrants"][name])(),
            "unsupported": TABLE.get(name, {}),
            "informed": name != "random",
        },
    )


for _entry in catalogue.family("pruner"):
    for _name in _entry.card["entrants"]:
        _made = _contract(_entry, _name)
        globals()[_made.__name__] = _made


def test_every_pruner_is_under_contract():
    assert all(entry.card["entrants"] for entry in catalogue.family("pruner"))
