"""Every initialiser on every model of the zoo: called with a model and a batch's inputs and a generator, in place."""

from __future__ import annotations

from pathlib import Path

import torch

from nervure import catalogue
from nervure.testing import InitialiserContract, table

TABLE = table.read(Path(__file__).with_name("expected.toml"))


def _initialise(entry: catalogue.Entry):
    def initialise(self, model, task, *, seed):
        catalogue.resolve(entry.id)(model, task.inputs, generator=torch.Generator().manual_seed(seed))

    return initialise


for _entry in catalogue.family("initialiser"):
    _name = f"Test{_entry.card['provides'][0].title().replace('_', '')}"
    globals()[_name] = type(
        _name,
        (InitialiserContract,),
        {"__module__": __name__, "initialise": _initialise(_entry), "unsupported": TABLE.get(_entry.id, {})},
    )
