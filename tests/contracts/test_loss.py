"""Every loss."""

from __future__ import annotations

from nervure import catalogue
from nervure.testing import LossContract

for _entry in catalogue.family("loss"):
    _name = f"Test{_entry.card['provides'][0]}"
    globals()[_name] = type(
        _name,
        (LossContract,),
        {"__module__": __name__, "loss": lambda self, entry=_entry: catalogue.resolve(entry.id)()},
    )
