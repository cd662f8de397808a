"""The claim: the experiment that can refute a paper here. A claim measures; `nervure.stats` decides."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from nervure.spec.card import Card

if TYPE_CHECKING:
    from nervure.spec.protocols import Ctx

Rule = Literal["interval", "every-seed"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """State one comparison the claim stands or falls with: method minus control is at least the margin.

    With ``control=None`` the method's own value is compared with the margin. Where lower is better the sign is
    turned, so that a positive difference always speaks for the method.

    Args:
        name: What is compared, in words.
        method: The arm that makes the claim.
        metric: The measured quantity.
        margin: How large the difference must be, in the metric's unit.
        control: The arm it is compared with, or None for an absolute bound.
        better: Whether higher or lower values are better.
        rule: ``"interval"`` asks the paired 95% interval of the mean difference to lie above the margin;
            ``"every-seed"`` asks every seed to reach it (a sign test; at least five seeds).
    """

    name: str
    method: str
    metric: str
    margin: float = 0.0
    control: str | None = None
    better: Literal["higher", "lower"] = "higher"
    rule: Rule = "interval"

    @classmethod
    def at_least(cls, name: str, *, method: str, metric: str, bound: float, rule: Rule = "interval") -> Check:
        """State that the method's metric is at least ``bound``.

        Args:
            name: What is checked, in words.
            method: The arm.
            metric: The measured quantity.
            bound: Its lower bound.
            rule: As in `Check`.

        Returns:
            The check.
        """
        return cls(name=name, method=method, metric=metric, margin=bound, rule=rule)

    @classmethod
    def at_most(cls, name: str, *, method: str, metric: str, bound: float, rule: Rule = "interval") -> Check:
        """State that the method's metric is at most ``bound``.

        Args:
            name: What is checked, in words.
            method: The arm.
            metric: The measured quantity.
            bound: Its upper bound.
            rule: As in `Check`.

        Returns:
            The check.
        """
        return cls(name=name, method=method, metric=metric, margin=-bound, better="lower", rule=rule)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Hold a claim's function together with what would confirm or refute it.

    Args:
        card: The paper's card.
        name: The function's name with hyphens.
        statement: What is claimed, in one sentence (the first paragraph of the docstring).
        measure: The function; it receives a `Ctx` for one seed and calls ``ctx.measure``.
        checks: The comparisons; all must hold.
        sabotage: For each sabotaged arm, the arm it stands in for. If all checks hold with the sabotaged arm
            in its place, the claim's verdict is void.
        seeds: How many seeds a normal run takes, fixed before the first run.
        minutes: The budget of the whole claim on two cores.
        data: Names of the data sets it reads.
    """

    card: Card
    name: str
    statement: str
    measure: Callable[[Ctx], None] = field(repr=False)
    checks: tuple[Check, ...]
    sabotage: Mapping[str, str] = field(default_factory=dict)
    seeds: int = 5
    minutes: float = 3.0
    data: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Return ``card-id/claim-name``."""
        return f"{self.card.id}/{self.name}"


def claim(
    card: Card,
    *,
    checks: tuple[Check, ...],
    sabotage: Mapping[str, str] | None = None,
    seeds: int = 5,
    minutes: float = 3.0,
    data: tuple[str, ...] = (),
) -> Callable[[Callable[[Ctx], None]], Claim]:
    """Turn a measuring function into a `Claim`; its docstring's first paragraph is the statement.

    Args:
        card: The card defined in the same file.
        checks: The comparisons; all must hold.
        sabotage: Sabotaged arm -> the arm it replaces.
        seeds: How many seeds a normal run takes.
        minutes: Budget in minutes on two cores.
        data: Names of the data sets it reads.

    Returns:
        The decorator.

    Raises:
        ValueError: If the function has no docstring or no check is given.
    """

    def wrap(measure: Callable[[Ctx], None]) -> Claim:
        text = inspect.getdoc(measure)
        if not text or not checks:
            raise ValueError(f"the claim {measure.__name__} of {card.id} needs a docstring and at least one check")
        return Claim(
            card=card,
            name=measure.__name__.replace("_", "-"),
            statement=" ".join(text.split("\n\n")[0].split()),
            measure=measure,
            checks=checks,
            sabotage=dict(sabotage or {}),
            seeds=seeds,
            minutes=minutes,
            data=data,
        )

    return wrap


def claims_of(module: ModuleType, card: Card) -> list[Claim]:
    """Return the claims a method's module defines, in the order of the card.

    Args:
        module: The imported module.
        card: Its card.

    Returns:
        The claims.

    Raises:
        ValueError: If the card names a claim the module does not define.
    """
    found = [getattr(module, name, None) for name in card.claims]
    missing = [name for name, value in zip(card.claims, found, strict=True) if not isinstance(value, Claim)]
    if missing:
        raise ValueError(f"card {card.id} names the claims {missing}, which {module.__name__} does not define")
    return [value for value in found if isinstance(value, Claim)]
