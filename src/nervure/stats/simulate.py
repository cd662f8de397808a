"""Simulate the decision rule on claims whose truth is known: ``python -m nervure.stats.simulate``.

Prints the tables of docs/statistics.md: how often a difference whose true mean is exactly the margin is called *holds*,
by distribution and number of seeds; the same for the percentile and BCa bootstrap, and for adding seeds until there is
a decision; and the power of the t rule.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator

import numpy as np
from scipy import stats

from nervure.spec.claim import Rule
from nervure.stats.intervals import Array, power
from nervure.stats.rule import HOLDS, decide

Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]
# Every distribution has mean 0; "long left tail" means rare large losses, which a few seeds do not show.
DISTRIBUTIONS: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy-tailed (t, 3 dof)": lambda rng, shape: rng.standard_t(3, shape),
    "exponential, long right tail": lambda rng, shape: rng.exponential(size=shape) - 1,
    "exponential, long left tail": lambda rng, shape: 1 - rng.exponential(size=shape),
    "lognormal, long right tail": lambda rng, shape: rng.lognormal(size=shape) - math.exp(0.5),
    "lognormal, long left tail": lambda rng, shape: math.exp(0.5) - rng.lognormal(size=shape),
    "normal, rounded to 1 s.d.": lambda rng, shape: np.rint(rng.standard_normal(shape)),
}
LOOKS = range(3, 201)


def holds_rate(
    draw: Draw, seeds: int, *, claims: int, rng: np.random.Generator, effect: float = 0.0, rule: Rule = "interval"
) -> float:
    """Return how often claims whose true mean difference is margin + effect are called *holds*.

    Args:
        draw: Draws differences of mean 0.
        seeds: Number of seeds a claim.
        claims: Number of simulated claims.
        rng: The generator.
        effect: Distance of the true mean from the margin.
        rule: The decision rule.

    Returns:
        The share of claims called *holds*.
    """
    return float((decide(draw(rng, (claims, seeds)) + effect, rule=rule).code == HOLDS).mean())


def until_decided(
    draw: Draw, *, claims: int, rng: np.random.Generator, effect: float = 0.0, looks: range = LOOKS
) -> tuple[float, Array]:
    """Add seeds one by one and look after each, as ``--until-decided`` does.

    Args:
        draw: Draws differences of mean 0.
        claims: Number of simulated claims.
        rng: The generator.
        effect: Distance of the true mean from the margin.
        looks: The numbers of seeds at which is looked.

    Returns:
        The share of claims whose first decision is *holds*, and for each claim the number of seeds at its first
        decision (infinite where there was none).
    """
    differences = draw(rng, (claims, looks[-1])) + effect
    first, code = np.full(claims, math.inf), np.zeros(claims, np.int8)
    for look in looks:
        waiting = np.flatnonzero(code == 0)
        code[waiting] = decide(differences[waiting, :look], until_decided=True).code
        first[waiting[code[waiting] != 0]] = look
    return float((code == HOLDS).mean()), first


def bootstrap_rate(draw: Draw, seeds: int, *, method: str, claims: int, rng: np.random.Generator) -> float:
    """Return how often a bootstrap interval calls a true null *holds*.

    Args:
        draw: Draws differences of mean 0.
        seeds: Number of seeds a claim.
        method: ``"percentile"`` or ``"BCa"``.
        claims: Number of simulated claims.
        rng: The generator.

    Returns:
        The share of claims whose interval lies at or above 0.
    """
    hits = 0
    for start in range(0, claims, 500):
        sample = draw(rng, (min(500, claims - start), seeds))
        drawn = stats.bootstrap((sample,), np.mean, axis=-1, n_resamples=999, method=method, random_state=rng)
        hits += int((drawn.confidence_interval.low >= 0).sum())
    return hits / claims


def tables(claims: int) -> Iterator[str]:
    """Yield the lines of all tables in Markdown.

    Args:
        claims: Number of simulated claims a cell.

    Yields:
        The lines.
    """
    rng = np.random.default_rng(0)
    sizes = (3, 5, 10, 20)
    yield from _header("true mean exactly at the margin, t rule", [f"{n} seeds" for n in sizes] + ["every-seed, 5"])
    for name, draw in DISTRIBUTIONS.items():
        rates = [holds_rate(draw, n, claims=claims, rng=rng) for n in sizes]
        yield _row(name, [*rates, holds_rate(draw, 5, claims=claims, rng=rng, rule="every-seed")])
    yield ""
    yield from _header("the same, other intervals", [f"{m}, {n}" for n in (5, 20) for m in ("percentile", "BCa")])
    for name in list(DISTRIBUTIONS)[:-1]:
        draw = DISTRIBUTIONS[name]
        cells = [(n, method) for n in (5, 20) for method in ("percentile", "BCa")]
        yield _row(name, [bootstrap_rate(draw, n, method=m, claims=claims // 5, rng=rng) for n, m in cells])
    yield ""
    yield from _header("until decided, a look after each of 3 to 200 seeds", ["holds"])
    for name, draw in DISTRIBUTIONS.items():
        yield _row(name, [until_decided(draw, claims=claims, rng=rng)[0]])
    yield ""
    yield from _header(
        "true effect, in s.d. beyond the margin", [f"power, {n} seeds" for n in sizes] + ["seeds until decided"]
    )
    for effect in (0.5, 1.0, 1.5, 2.0, 3.0):
        middle = np.median(until_decided(DISTRIBUTIONS["normal"], claims=claims // 5, rng=rng, effect=effect)[1])
        yield _row(f"{effect}", list(power(effect, np.array(sizes)))) + f" {middle:.0f} |"


def _header(first: str, columns: list[str]) -> list[str]:
    return [f"| {' | '.join([first, *columns])} |", f"|---{'|---:' * len(columns)}|"]


def _row(name: str, shares: list[float]) -> str:
    return f"| {name} | {' | '.join(f'{share:.1%}' for share in shares)} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m nervure.stats.simulate", description="Judge the decision rule.")
    parser.add_argument("--claims", type=int, default=10_000, help="simulated claims a cell (default 10000)")
    for line in tables(parser.parse_args().claims):
        print(line, flush=True)


if __name__ == "__main__":
    main()
