"""compare shortcut-fixes: which remedy learns the other feature too, at an equal number of gradient evaluations?"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nervure.arena.contest import Contest, Trial
from nervure.core import forward
from nervure.core.feature_groups import cycle
from nervure.core.shortcut_tasks import moon, two_colours
from nervure.data import load
from nervure.data.shortcuts import slabs
from nervure.learn.shortcut_fixes import FIXES


@dataclass(frozen=True)
class Case:
    """Hold training data with a shortcut, and test data in groups with and without it.

    Args:
        train: Inputs and classes.
        clean: Test data like the training data.
        groups: Name -> test inputs and classes in which the shortcut does not help.
        build: Builds a classifier of two scores.
    """

    train: tuple[Tensor, Tensor]
    clean: tuple[Tensor, Tensor]
    groups: dict[str, tuple[Tensor, Tensor]]
    build: Callable[[], nn.Module]


def _dense(*sizes: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(sizes[:-1]):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))

    return build


def _moons(trial: Trial) -> Case:
    x, y = moon(600, gap=0.1, noise=0.1, seed=trial.seed_for("train"))
    clean = moon(1000, gap=0.1, noise=0.1, seed=trial.seed_for("clean"))
    other, classes = moon(2000, gap=-0.3, noise=0.1, seed=trial.seed_for("test"))
    groups = {f"class {c}, overlapping": (other[classes == c], classes[classes == c]) for c in (0, 1)}
    return Case((x, y), clean, groups, _dense(2, 200, 200, 2))


def _slabs(trial: Trial) -> Case:
    made = slabs(4000, test=2000, coordinates=(1, 5, 5), seed=trial.seed)
    clean = (made.test_x, made.test_y)
    moved = made.test_x.clone()
    moved[:, 0] = moved[cycle(len(moved), seed=trial.seed), 0]
    groups = {f"class {c}, line shuffled": (moved[clean[1] == c], clean[1][clean[1] == c]) for c in (0, 1)}
    return Case((made.train_x, made.train_y), clean, groups, _dense(3, 100, 100, 2))


def _colours(trial: Trial) -> Case:
    data = load("fashion-mnist", seed=trial.seed, train=4000, test=2000)
    halves = [
        (x[..., ::2, ::2], (y >= 5).long()) for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y))
    ]
    seen = two_colours(*halves[0], agreement=(0.85,), noise=0.1, seed=trial.seed_for("train"))
    like = two_colours(*halves[1], agreement=(0.85,), noise=0.0, seed=trial.seed_for("clean"))
    turned = two_colours(*halves[1], agreement=(0.5,), noise=0.0, seed=trial.seed_for("test"))
    groups = {}
    for label, colour in itertools.product((0, 1), (0, 1)):
        mine = (turned.y == label) & (turned.colour == colour)
        groups[f"class {label}, colour {colour}"] = (turned.x[mine], turned.y[mine])
    return Case((seen.x, seen.y), (like.x, like.y), groups, _dense(2 * 14 * 14, 100, 50, 2))


CASES: dict[str, tuple[Callable[[Trial], Case], int, str]] = {
    "moons": (_moons, 2000, "a straight line parts the moons in training and not in the test"),
    "slabs": (_slabs, 3000, "one linear coordinate and two of five slabs; the linear one is shuffled in the test"),
    "two colours": (
        _colours,
        2000,
        "the colour agrees with a noisy label in 85% of all cases; worst of class and colour",
    ),
}


def _right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((forward.predict(model, x).argmax(1) == y).double().mean())


def measure(trial: Trial) -> None:
    """Train every remedy on one case and look at its worst group.

    Args:
        trial: One case.
    """
    made, steps, _ = CASES[trial.case]
    case = made(trial)
    budget = steps // (10 if trial.quick else 1)

    def enter(name: str) -> dict[str, float]:
        began = time.process_time()
        model = FIXES[name](case.build, case.train, steps=budget, seed=trial.seed_for("weights"))
        found = {group: _right(model, x, y) for group, (x, y) in case.groups.items()}
        return {
            "worst": min(found.values()),
            "mean": sum(found.values()) / len(found),
            "clean": _right(model, *case.clean),
            "seconds": time.process_time() - began,
        }

    with torch.enable_grad():
        trial.each(enter)


CONTEST = Contest(
    name="shortcut-fixes",
    title="Remedies against shortcuts, by their worst group",
    metric="worst",
    better="higher",
    baselines=("erm",),
    entrants={
        "erm": "plain training",
        "weight-decay": "an L2 penalty of 0.01",
        "early-stopping": "the network of the least loss on samples held out",
        "spectral-decoupling": "a penalty on the scores",
        "rfc-bonsai": "discovery rounds and a synthesis of their features",
        "cat-representations": "a linear head on the features of several networks",
        "ensemble": "the mean of several networks' scores",
    },
    cases={name: told for name, (_, _, told) in CASES.items()},
    quick=("moons", "slabs"),
    seeds=5,
    protocol="Every remedy gets the same number of gradient evaluations, with discovery rounds, heads and all "
    "members counted, the same first weights and its own default strength; nothing is chosen on the test groups. "
    "Worst is the least accuracy over groups in which the shortcut does not help. Penalties with group labels (group "
    "DRO, V-REx) and sharpness-aware training do not take part: the first are told what the others are not.",
    measure=measure,
    columns={"mean": "mean over the groups", "clean": "accuracy with the shortcut", "seconds": "CPU seconds"},
)
