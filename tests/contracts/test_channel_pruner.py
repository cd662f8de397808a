"""Every pruner of channels on every model of the zoo."""

from __future__ import annotations

from pathlib import Path

from nervure import catalogue
from nervure.testing import ChannelPrunerContract, table

TABLE = table.read(Path(__file__).with_name("expected.toml"))


def _contract(entry: catalogue.Entry, name: str, attribute: str) -> type[ChannelPrunerContract]:
    return type(
        f"Test{attribute.title().replace('_', '')}",
        (ChannelPrunerContract,),
        {
            "__module__": __name__,
            "method": lambda self: getattr(entry.load(), attribute)(),
            "unsupported": TABLE.get(name, {}),
        },
    )


for _entry in catalogue.family("channel-pruner"):
    for _name, _attribute in (_entry.card["entrants"] or {_entry.id: _entry.card["provides"][0]}).items():
        _made = _contract(_entry, _name, _attribute)
        globals()[_made.__name__] = _made
