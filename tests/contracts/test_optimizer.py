"""Every optimizer; one that wants another call than ``step()`` says so here."""

from __future__ import annotations

from torch.nn import functional as F

from nervure import catalogue
from nervure.testing import OptimizerContract


def _ivon_step(self, optimizer, model, x, y):
    optimizer.zero_grad()
    with optimizer.sample():
        loss = F.mse_loss(model(x), y)
        loss.backward()
    optimizer.step()
    return float(loss.detach())


EXAMPLES = {
    "ivon": {
        "make": lambda self, parameters: catalogue.resolve("ivon")(parameters, lr=0.1, ess=1000),
        "step": _ivon_step,
    }
}

for _entry in catalogue.family("optimizer"):
    _name = f"Test{_entry.card['provides'][0]}"
    _settings = {"make": lambda self, parameters, entry=_entry: catalogue.resolve(entry.id)(parameters)}
    globals()[_name] = type(
        _name, (OptimizerContract,), {"__module__": __name__, **_settings, **EXAMPLES.get(_entry.id, {})}
    )
