"""Every diagnostic on every model of the zoo."""

from __future__ import annotations

import copy
import inspect
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F

from nervure import catalogue
from nervure.core import forward, rng
from nervure.core.vectors import select
from nervure.testing import DiagnosticContract, table
from nervure.zoo.conv import LeNet

TABLE = table.read(Path(__file__).with_name("expected.toml"))
# Diagnostics that ask for eval mode, because in train mode batch normalisation mixes the samples.
EVAL = {
    "hessian-spectrum",
    "gradient-coherence",
    "functional-dimension",
    "sgd-linear-stability",
    "opposing-signals",
    "flatness-not-sufficient",
    "effective-model-complexity",
    "no-tight-bounds",
}


def _few(model, most=60):
    """Name parameters of at most so many entries in all, from both ends of the model: dense Hessians in 0.1 s."""
    sizes = {name: value.numel() for name, value in select(model).items()}
    names = list(sizes)
    chosen: list[str] = []
    for name in [name for pair in zip(names, reversed(names), strict=True) for name in pair]:
        if name not in chosen and sum(sizes[one] for one in [*chosen, name]) <= most:
            chosen.append(name)
    return chosen


def _dense(model):
    return {"k": 1, "parameters": _few(model)}


def _iterative(model):
    return {"k": 1, "dense_below": 0}


def _some(model):
    return {"parameters": _few(model, most=150)}


def _short(model):
    return {"epochs": 1, "rounds": 1, "start": 4, "parameters": _few(model, most=150)}


def _coordinates(model):
    """Score by the loss, which tells any two models apart."""
    score = lambda out, y: -float(F.cross_entropy(out.flatten(0, -2), y.flatten()))  # noqa: E731
    return {"start": 2, "most": 4, "steps": 1, "score": score, "goal": 0.0}


def _near(model):
    """Compare the model with a copy whose weights were disturbed."""
    other, draw = copy.deepcopy(model), rng.generator("near")
    with torch.no_grad():
        for value in other.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=draw))
    return other


def _compared(model):
    return {"other": _near(model), "points": 3, "restarts": 0}


def _moved(model):
    return {"start": _near(model), "points": 3, "beyond": 0.0}


def _last(model):
    """Name the last two linear or convolutional layers; torch's own attention never calls its output layer."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    names = [name for name, one in model.named_modules() if isinstance(one, kinds) and "out_proj" not in name]
    return {"layers": names[-2:], "probes": 8}


def _matched(model):
    return {"other": _near(model), "clusters": 2, "penalty": 0.9}


def _slice(model):
    """Vary the largest inputs along every 40th of their entries: all would take a second."""
    return {"directions": torch.eye(784)[::40]} if isinstance(model, LeNet) else {}


# Method -> name of a variant -> its zoo models (None: all) and its options.
VARIANTS = {
    "linear-mode-connectivity": {"": (None, _compared)},
    "linear-path": {"": (None, _moved)},
    "convergent-learning": {"": (None, _matched)},
    "hessian-spectrum": {"": (None, _dense), "Iterative": (("twice-used",), _iterative)},
    "functional-dimension": {"": (None, _some)},
    "interaction-basis": {"": (None, _last)},
    "information-plane": {"": (None, lambda model: {"bins": 30, "noise": 1.0})},
    "opposing-signals": {"": (None, lambda model: {"steps": 3, "learning_rate": 0.5})},
    "flatness-not-sufficient": {"": (None, lambda model: {"products": 9})},
    "no-tight-bounds": {"": (None, lambda model: {"draws": 1})},
    "effective-model-complexity": {"": (None, _short)},
    "intrinsic-dimension": {"": (None, _coordinates)},
    "nfl-kolmogorov": {"": (None, lambda model: {"epochs": 1, "start": 4, "growth": 2.0})},
    "nn-as-decision-tree": {"": (None, _slice)},
    "sgd-linear-stability": {"": (None, lambda model: {"exact_below": 20})},
}


def _run(entry: catalogue.Entry, options):
    def run(self, model, task, *, seed):
        batch = (task.inputs, task.targets)
        diagnose = catalogue.resolve(entry.id)
        given = {"loss": task.loss_function} if "loss" in inspect.signature(diagnose).parameters else {}
        with forward.mode(model, train=False) if entry.id in EVAL else nullcontext():
            return diagnose(model, batch, seed=seed, **given, **options(model))

    return run


for _entry in catalogue.family("diagnostic"):
    for _variant, (_cases, _options) in VARIANTS.get(_entry.id, {"": (None, lambda model: {})}).items():
        _name = f"Test{_entry.card['provides'][0].title().replace('_', '')}{_variant}"
        _body = {"__module__": __name__, "run": _run(_entry, _options), "unsupported": TABLE.get(_entry.id, {})}
        globals()[_name] = type(_name, (DiagnosticContract,), {**_body, **({"cases": _cases} if _cases else {})})
