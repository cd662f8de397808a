"""Every layer: how it is built and what it takes stands here, one line each."""

from __future__ import annotations

import torch

from nervure import catalogue
from nervure.testing import LayerContract

EXAMPLES = {
    "siren": (lambda kind: kind(2, 3, hidden=6, layers=2, omega_0=5.0), lambda count: torch.linspace(-1, 1, 2 * count)),
}


def _contract(entry: catalogue.Entry) -> type[LayerContract]:
    build, draw = EXAMPLES[entry.id]
    return type(
        f"Test{entry.card['provides'][0]}",
        (LayerContract,),
        {
            "__module__": __name__,
            "layer": lambda self: build(catalogue.resolve(entry.id)),
            "inputs": lambda self, count: draw(count).reshape(count, -1),
        },
    )


for _entry in catalogue.family("layer"):
    _made = _contract(_entry)
    globals()[_made.__name__] = _made
