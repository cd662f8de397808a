"""From a question to the jobs that answer it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nervure._kit import UsageError
from nervure.spec import Job


def plan_claim(
    claim_id: str,
    *,
    seeds: int | Iterable[int],
    params: Mapping[str, Any] | None = None,
    case: str = "default",
    seconds: float | None = None,
) -> list[Job]:
    """Plan one job a seed; all arms of a claim share a seed's work.

    Args:
        claim_id: ``card-id/claim-name``.
        seeds: How many seeds, from 0 on, or the seeds themselves.
        params: What else changes the result, such as ``{"quick": True}``.
        case: The problem the claim is run on.
        seconds: Time limit of one job.

    Returns:
        The jobs.

    Raises:
        UsageError: If there is no seed, or the time limit is not positive.

    Examples:
        >>> [job.seed for job in plan_claim("snip/keeps-accuracy", seeds=3)]
        [0, 1, 2]
    """
    chosen = list(dict.fromkeys(range(seeds) if isinstance(seeds, int) else seeds))
    if not chosen:
        raise UsageError("there is no seed to run", expected="at least one", found=seeds)
    if seconds is not None and not seconds > 0:
        raise UsageError("the time limit is not positive", expected="seconds above 0", found=seconds)
    budget = {} if seconds is None else {"seconds": float(seconds)}
    target = f"claim:{claim_id}"
    return [
        Job(target=target, arm="*", case=case, seed=seed, params=dict(params or {}), budget=budget) for seed in chosen
    ]
