"""Every diagnostic, on models small enough for a Hessian in a second."""

from __future__ import annotations

from pathlib import Path

from nervure import catalogue
from nervure.testing import DiagnosticContract, table

TABLE = table.read(Path(__file__).with_name("expected.toml"))
OPTIONS = {"hessian-spectrum": {"k": 1}}


def _run(entry: catalogue.Entry):
    def run(self, model, task, *, seed):
        batch, options = (task.inputs, task.targets), OPTIONS.get(entry.id, {})
        return catalogue.resolve(entry.id)(model, batch, loss=task.loss_function, seed=seed, **options)

    return run


for _entry in catalogue.family("diagnostic"):
    _name = f"Test{_entry.card['provides'][0].title().replace('_', '')}"
    globals()[_name] = type(
        _name,
        (DiagnosticContract,),
        {
            "__module__": __name__,
            "cases": ("raw-parameter", "dict-tuple"),
            "run": _run(_entry),
            "unsupported": TABLE.get(_entry.id, {}),
        },
    )
