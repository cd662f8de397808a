"""Every kernel on every model of the zoo."""

from __future__ import annotations

from pathlib import Path

import torch

from nervure import catalogue
from nervure.testing import KernelContract, table

TABLE = table.read(Path(__file__).with_name("expected.toml"))


def _gram(entry: catalogue.Entry):
    def gram(self, model, inputs):
        found = catalogue.resolve(entry.id)(model, inputs)
        whole = found.full
        # (N, N) as it is; (N, N, O, O) summed over the outputs.
        return whole if whole.ndim == 2 else torch.einsum("nmoo->nm", whole)

    return gram


for _entry in catalogue.family("kernel"):
    _name = f"Test{_entry.card['provides'][0].title().replace('_', '')}"
    globals()[_name] = type(
        _name,
        (KernelContract,),
        {"__module__": __name__, "gram": _gram(_entry), "unsupported": TABLE.get(_entry.id, {})},
    )
