"""What PBT's claims share: the paper's toy, two small networks, and a race of searches at equal steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from nervure.core.population import SGD, Population
from nervure.search.drive import run_population, set_hyper
from nervure.search.space import Prior, Range
from nervure.spec import Ctx

if TYPE_CHECKING:
    from nervure.search.pbt import PBT

MEMBERS = 16
SPACE: dict[str, Prior] = {
    "lr": Range(1e-3, 1.0, log=True),
    "momentum": Range(0.0, 0.95, limits=(0.0, 0.99)),
    "weight_decay": Range(1e-6, 1e-2, log=True),
    "dropout": Range(0.0, 0.5, limits=(0.0, 0.9)),
}
Pairs = tuple[Tensor, Tensor]


class Surrogate:
    """The paper's two-dimensional toy: true Q = 1.2 - |theta|^2, trained on 1.2 - h_0 theta_0^2 - h_1 theta_1^2."""

    def __init__(self) -> None:
        self.theta = np.array([0.9, 0.9])

    def step(self, config: Mapping[str, float]) -> None:
        weights = np.array([config["h0"], config["h1"]])
        for _ in range(5):
            self.theta = self.theta - 0.01 * 2 * weights * self.theta

    def eval(self) -> float:
        return float(1.2 - self.theta @ self.theta)

    def state_dict(self) -> Any:
        return self.theta

    def load_state_dict(self, state: Any) -> None:
        self.theta = state


def dense() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))


def conv() -> nn.Module:
    """Build a network of 3,978 parameters for images of 14 x 14."""
    layers = nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.1), nn.Linear(256, 10))


def race(
    ctx: Ctx,
    searches: Mapping[str, PBT],
    build: Callable[[], nn.Module],
    train: Pairs,
    validation: Pairs,
    test: Pairs,
    *,
    ready: int,
    batch_size: int,
) -> None:
    """Run every search for the same steps from the same starts; measure each winner's loss on the test data.

    The arm "schedule" runs last: it trains fresh starts under the schedule that the winner of the arm "pbt" came by.

    Args:
        ctx: The claim's context.
        searches: Arm -> its search; "schedule" has one without exchange.
        build: Builds a network.
        train: Training inputs and targets.
        validation: What the searches score on.
        test: What no search sees.
        ready: Optimizer steps of an interval; there are 40 intervals.
        batch_size: Samples in a step.
    """
    intervals = ctx.scaled(40, 8)
    for done, (arm, search) in enumerate(searches.items()):
        ctx.progress(done, len(searches), arm)
        schedule = searches["pbt"].schedule() if arm == "schedule" else None
        starts = "members" if schedule is None else "fresh"
        seeds = [ctx.seed_for(starts, index) for index in range(MEMBERS)]
        # A named backend: which one is faster may differ between runs, and with it the last bits.
        crowd = Population.build(build, seeds=seeds, optimizer=SGD(momentum=0.9), backend="batched")
        run_population(
            search,
            crowd,
            train,
            validation,
            intervals=intervals,
            ready=ready,
            batch_size=batch_size,
            apply=set_hyper if schedule is None else _follow(schedule, ready),
        )
        loss = crowd.evaluate(*test).loss[search.best]
        ctx.measure(arm, loss=float(loss), accuracy=ctx.accuracy(crowd.member(search.best), *test))


def _follow(schedule: Sequence[Mapping[str, float]], ready: int) -> Callable[..., None]:
    def apply(crowd: Population, member: int, _: Mapping[str, float]) -> None:
        set_hyper(crowd, member, schedule[crowd.steps // ready])

    return apply
