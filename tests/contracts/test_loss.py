"""Every loss."""

from __future__ import annotations

from nervure import catalogue
from nervure.testing import LossContract


def _loss(entry: catalogue.Entry):
    """Return the loss itself, or one with its defaults where the card provides a class."""
    provided = catalogue.resolve(entry.id)
    return provided() if isinstance(provided, type) else provided


for _entry in catalogue.family("loss"):
    _name = f"Test{_entry.card['provides'][0].title().replace('_', '')}"
    globals()[_name] = type(
        _name,
        (LossContract,),
        {"__module__": __name__, "loss": lambda self, entry=_entry: _loss(entry)},
    )
