"""A contest: entrants measured on cases whose truth is known, every seed of a case one job."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from nervure._kit import NervureError, UnknownId, UsageError, did_you_mean
from nervure.core import Meter, rng
from nervure.spec import Job, Measurement, Notes

Progress = Callable[[float, str], None]
CONTESTS = {
    "curvature": "nervure.arena.curvature",
    "delayed-generalisation": "nervure.arena.delayed_generalisation",
    "generalisation-measures": "nervure.arena.generalisation_measures",
    "shortcut-fixes": "nervure.arena.shortcut_fixes",
    "similarity": "nervure.arena.similarity",
}


@dataclass
class Trial:
    """Give a contest one case and seed, and keep what it measures.

    Args:
        case: The case.
        seed: The seed.
        entrants: Who takes part.
        quick: Whether this is a rehearsal.
        progress: Called with (share done, text).
        notes: Where measurements go.
        done: How many entrants are through.
    """

    case: str
    seed: int
    entrants: Sequence[str]
    quick: bool
    progress: Progress
    notes: Notes
    done: int = field(default=0)

    def seed_for(self, *tags: object) -> int:
        """Return an integer seed that depends on (case, seed, tags) only."""
        return rng.seed_for("contest", self.case, self.seed, *tags)

    def measure(self, arm: str, *, step: float | None = None, **metrics: float) -> None:
        """Record numbers of an entrant; with `step`, a point of a curve."""
        self.notes.measurements += [
            Measurement(arm=arm, metric=name, value=float(value), step=step) for name, value in metrics.items()
        ]

    def each(self, enter: Callable[[str], Mapping[str, float] | None]) -> None:
        """Let every entrant take its turn; one that cannot is told in a warning and does not stop the others.

        Args:
            enter: From an entrant to its numbers, or None where it does not take part in this case.
        """
        for name in self.entrants:
            self.progress(self.done / len(self.entrants), f"{name}, {self.case}, seed {self.seed}")
            try:
                found = enter(name)
            except NervureError as error:
                self.notes.warnings.append(f"{name}: {str(error).splitlines()[0]}")
                found = None
            if found is not None:
                self.measure(name, **found)
            self.done += 1


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Describe a comparison.

    Args:
        name: As in ``nervure compare NAME``.
        title: Title of the page.
        metric: What is compared.
        better: Whether higher or lower is better.
        baselines: The entrants the others are compared with: in each case the first that takes part.
        entrants: All who may take part -> what they are, in a few words.
        cases: All cases -> what they are.
        quick: The cases of a rehearsal.
        seeds: Number of seeds of a full run, at least 2.
        protocol: How it is made fair, in a sentence or two.
        columns: Further metrics -> their headings.
        measure: Measures one trial.
        version: Part of every job: a change of the measurement makes old records those of another.
    """

    name: str
    title: str
    metric: str
    better: Literal["higher", "lower"]
    baselines: tuple[str, ...]
    entrants: Mapping[str, str]
    cases: Mapping[str, str]
    quick: tuple[str, ...]
    seeds: int
    protocol: str
    measure: Callable[[Trial], None]
    columns: Mapping[str, str] = field(default_factory=dict)
    version: int = 1

    def plan(
        self, *, entrants: Sequence[str] = (), cases: Sequence[str] = (), seeds: int | None = None, quick: bool = False
    ) -> list[Job]:
        """Check the choice and list its jobs.

        Args:
            entrants: Who takes part; all when empty, and the baselines always.
            cases: The cases; all when empty.
            seeds: How many seeds.
            quick: Whether it is a rehearsal.

        Returns:
            A job for each case and seed.

        Raises:
            UsageError: If a name is unknown or there are too few seeds.
        """
        for kind, given, known in (("entrant", entrants, self.entrants), ("case", cases, self.cases)):
            unknown = [name for name in given if name not in known]
            if unknown:
                near = " or ".join(did_you_mean(unknown[0], list(known)))
                raise UsageError(f"there is no {kind} {unknown[0]!r}", expected=", ".join(known), try_=near or None)
        count = seeds if seeds is not None else 2 if quick else self.seeds
        if count < 1:
            raise UsageError("there is nothing to compare", expected="a seed or more", found=count)
        names = [name for name in self.entrants if not entrants or name in entrants or name in self.baselines]
        chosen = [case for case in self.cases if (case in cases if cases else not quick or case in self.quick)]
        params = {"entrants": names, "quick": quick, "version": self.version}
        return [
            Job(target=f"arena:{self.name}", arm="*", case=case, seed=seed, params=params)
            for seed in range(count)
            for case in chosen
        ]

    def run(self, job: Job, progress: Progress, notes: Notes) -> None:
        """Do one job.

        Args:
            job: As `plan` made it.
            progress: Called with (share done, text).
            notes: Filled as it goes.
        """
        meter = Meter(track_saved=False)
        entrants, quick = [str(name) for name in job.params["entrants"]], bool(job.params["quick"])
        try:
            with meter:
                self.measure(Trial(job.case, job.seed, entrants, quick, progress, notes))
        finally:
            notes.cost.update(meter.cost())


def contest(name: str) -> Contest:
    """Return a contest by its name.

    Args:
        name: As in ``nervure compare NAME``.

    Returns:
        The contest.

    Raises:
        UnknownId: If there is none of that name.
    """
    if name not in CONTESTS:
        near = " or ".join(did_you_mean(name, list(CONTESTS)))
        raise UnknownId(f"there is no comparison {name!r}", expected=", ".join(["prune", *CONTESTS]), try_=near or None)
    found: Contest = importlib.import_module(CONTESTS[name]).CONTEST
    return found
