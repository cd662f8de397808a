"""Every training rule on every model of the zoo."""

from __future__ import annotations

from pathlib import Path

from nervure import catalogue
from nervure.testing import TrainingRuleContract, table

TABLE = table.read(Path(__file__).with_name("expected.toml"))
for _entry in catalogue.family("training-rule"):
    _name = f"Test{_entry.card['provides'][0]}"
    globals()[_name] = type(
        _name,
        (TrainingRuleContract,),
        {
            "__module__": __name__,
            "make": lambda self, model, inputs, entry=_entry: catalogue.resolve(entry.id)(model, inputs),
            "unsupported": TABLE.get(_entry.id, {}),
        },
    )
