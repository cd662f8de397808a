"""Drive a population-based search: over anything that steps and saves itself, or over networks trained as one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from nervure._kit import UsageError
from nervure.core.population import Population

if TYPE_CHECKING:
    from nervure.search.pbt import PBT


class Trainable(Protocol):
    """Anything that can be trained for a while, scored, saved and restored."""

    def step(self, config: Mapping[str, float]) -> None:
        """Train for one interval under these hyper-parameters."""

    def eval(self) -> float:
        """Return the score; higher is better."""

    def state_dict(self) -> Any:
        """Return weights and optimizer state."""

    def load_state_dict(self, state: Any) -> None:
        """Take back what `state_dict` returned."""


def run_trainables(search: PBT, trainables: Sequence[Trainable], *, intervals: int) -> None:
    """Drive anything that steps, evaluates and saves itself.

    Args:
        search: The search.
        trainables: One for each member; when this returns, each stands where its last interval ended.
        intervals: Intervals each member trains.

    Raises:
        UsageError: If there is not one trainable for each member.
    """
    if len(trainables) != len(search):
        raise UsageError("PBT needs one trainable for each member", expected=len(search), found=len(trainables))
    saved: dict[int | None, Any] = {}  # by trained interval: a parent may have gone on since it was chosen
    for _ in range(intervals * len(search)):
        asked = search.ask()
        member = int(asked["member"])
        if asked["parent"] != member:
            trainables[member].load_state_dict(copy.deepcopy(saved[search.origin[member]]))
        trainables[member].step({name: asked[name] for name in search.space})
        score = trainables[member].eval()
        saved[len(search.trained)] = copy.deepcopy(trainables[member].state_dict())
        search.tell(asked, score)
        needed = {*search.origin, *search.last}
        saved = {at: state for at, state in saved.items() if at in needed}


def set_hyper(population: Population, member: int, config: Mapping[str, float]) -> None:
    """Give a member its hyper-parameters: ``"dropout"`` to its dropout layers, all others to the optimizer.

    Args:
        population: The population.
        member: The member.
        config: The hyper-parameters.
    """
    values = dict(config)
    if "dropout" in values:
        population.set_dropout(member, values.pop("dropout"))
    population.optimizer.set(member, **values)


def run_population(
    search: PBT,
    population: Population,
    train: tuple[Any, Tensor],
    validation: tuple[Any, Tensor],
    *,
    intervals: int,
    ready: int,
    batch_size: int = 64,
    apply: Callable[[Population, int, Mapping[str, float]], None] = set_hyper,
) -> None:
    """Drive networks of one architecture, trained as one population; the score is minus the validation loss.

    Args:
        search: A synchronous search.
        population: As many networks as the search has members.
        train: Training inputs and targets.
        validation: Validation inputs and targets.
        intervals: Intervals to train.
        ready: Optimizer steps of an interval, at least 1.
        batch_size: Samples in a step.
        apply: Gives a member of the population its hyper-parameters.

    Raises:
        UsageError: If the search is asynchronous or of another size.
    """
    if search.asynchronous or len(search) != len(population):
        raise UsageError("a population needs a synchronous search of its own size", try_="run_trainables")
    for _ in range(intervals):
        asked = [search.ask() for _ in range(len(search))]
        population.select([int(config["parent"]) for config in asked])
        for config in asked:
            own = {name: config[name] for name in search.space}
            apply(population, int(config["member"]), own)
        population.fit(*train, steps=ready, batch_size=batch_size)
        scores = population.evaluate(*validation).loss.neg().tolist()
        for config, score in zip(asked, scores, strict=True):
            search.tell(config, score)
