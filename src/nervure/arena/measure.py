"""Do a job: run a claim for one seed, or one entrant of an arena on one case."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

from nervure._kit import UnknownId, UsageError
from nervure.arena.contest import CONTESTS, contest
from nervure.arena.context import Context
from nervure.catalogue import get
from nervure.core import Meter
from nervure.spec import Claim, Job, Notes, claims_of

Progress = Callable[[float, str], None]


def find_claim(claim_id: str) -> Claim:
    """Return a claim by ``card/claim``, or a card's first claim by ``card`` alone.

    Args:
        claim_id: The id.

    Returns:
        The claim.

    Raises:
        UnknownId: If the card has no such claim.
        UsageError: If the card has no claim at all.
    """
    card_id, _, name = claim_id.partition("/")
    entry = get(card_id)
    module = entry.load()
    claims = claims_of(module, module.CARD)
    if not claims:
        raise UsageError(f"{card_id} has no claim to run", try_=f"nervure show {card_id}")
    for candidate in claims:
        if not name or candidate.name == name:
            return candidate
    raise UnknownId(f"{card_id} has no claim {name!r}", expected=" or ".join(found.name for found in claims))


def measure(job: Job, progress: Progress, notes: Notes) -> None:
    """Run a job in this process.

    Args:
        job: The job; its target is ``claim:...`` or ``arena:...``.
        progress: Called with (share done, text).
        notes: Filled as the job goes, so that a failure keeps what was measured before it.

    Raises:
        UsageError: If the target is of no known kind.
    """
    kind, _, name = job.target.partition(":")
    if kind == "claim":
        _measure_claim(job, find_claim(name), progress, notes)
    elif kind == "arena" and name == "prune":
        importlib.import_module("nervure.arena.prune").measure(job, progress, notes)
    elif kind == "arena" and name in CONTESTS:
        contest(name).run(job, progress, notes)
    else:
        raise UsageError("the job has no known target", expected="claim:... or arena:...", found=job.target)


def _measure_claim(job: Job, claim: Claim, progress: Progress, notes: Notes) -> None:
    options: Mapping[str, object] = job.params
    context = Context(
        claim.id,
        job.seed,
        quick=bool(options.get("quick", False)),
        data=_text(options.get("data")),
        seconds=job.budget.get("seconds"),
        progress=progress,
    )
    notes.measurements, notes.warnings = context.measurements, context.warnings
    meter = Meter(track_saved=False)
    try:
        with meter:
            claim.measure(context)
    finally:
        notes.cost.update(meter.cost())


def _text(value: object) -> str | None:
    return str(value) if value is not None else None
