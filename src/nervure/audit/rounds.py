"""The rounds: every check in turn, within a budget, each failure told and none hiding another."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from nervure._kit import NervureError, UsageError
from nervure.audit import against, behaviour, classes, landscape, layers, predictions, price
from nervure.audit.finding import Audit, Finding
from nervure.audit.subject import Subject
from nervure.core.persample import Loss
from nervure.core.probe import Probe


@dataclass(frozen=True)
class Check:
    """Hold one check.

    Args:
        name: As in its findings.
        run: From the subject to the finding, or None where it does not apply.
        data: Whether it needs data.
    """

    name: str
    run: Callable[[Subject], Finding | None]
    data: bool = True


CHECKS: tuple[Check, ...] = (
    Check("weights", behaviour.finite_weights, data=False),
    Check("filters", layers.filters, data=False),
    Check("determinism", behaviour.determinism),
    Check("modes", behaviour.modes),
    Check("parameters", behaviour.parameters_in_use),
    Check("accuracy", predictions.accuracy),
    Check("calibration", predictions.calibration),
    Check("dead units", layers.dead_units),
    Check("redundant units", layers.redundant_units),
    Check("signals", layers.signals),
    Check("collapse", classes.collapse),
    Check("separability", classes.separability),
    Check("feature groups", classes.feature_groups),
    Check("coherence", landscape.coherence),
    Check("functional dimension", landscape.dimension),
    Check("curvature", landscape.curvature),
    Check("price", price.price),
    Check("one-pixel shifts", predictions.one_pixel),
    Check("prunability", price.prunability),
)


def audit(
    model: nn.Module,
    *,
    loss: Loss,
    name: str = "model",
    train: tuple[Any, Tensor] | None = None,
    test: tuple[Any, Tensor] | None = None,
    data: str = "",
    rate: float | None = None,
    seconds: float = 100.0,
    only: tuple[str, ...] = (),
    other: tuple[str, nn.Module] | None = None,
    seed: int = 0,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> Audit:
    """Examine a network; it is left as it was.

    Args:
        model: The network.
        loss: From (output, targets) of a batch to its mean loss.
        name: What the user calls the network.
        train: Training inputs and targets; without them only the weights are looked at.
        test: Held-out inputs and targets; the training ones when None.
        data: What the user calls the data.
        rate: The learning rate the network is trained with.
        seconds: Budget, at least 1; samples are as many as it pays for.
        only: Names of the checks to make; all when empty.
        other: Name and network to compare it with; needs data.
        seed: Decides everything random.
        progress: Called with the share done and the name of the next check.

    Returns:
        The findings.

    Raises:
        UsageError: If there is no such check, no budget, or no data to compare networks on.

    Examples:
        >>> import torch
        >>> x, y = torch.randn(80, 4), torch.randint(2, (80,))
        >>> found = audit(nn.Linear(4, 2), loss=nn.functional.cross_entropy, train=(x, y), only=("determinism",))
        >>> found.findings[0].level
        'ok'
    """
    known = [check.name for check in CHECKS]
    unknown = [one for one in only if one not in known]
    if unknown or seconds < 1:
        expected = f"checks among {', '.join(known)}; a budget of a second or more"
        raise UsageError("the audit cannot be made so", expected=expected, found=f"{unknown}, {seconds} s")
    if other is not None and train is None:
        raise UsageError("two networks are compared on data", expected="data", found="none", try_="--data")
    probe = Probe(model, train, loss=loss, seconds=seconds, seed=seed) if train is not None else None
    subject = Subject(
        model, name=name, probe=probe, test=test if test is not None else train, data=data, rate=rate, seed=seed
    )
    chosen = [check for check in CHECKS if (not only or check.name in only) and (probe is not None or not check.data)]
    findings, spent = [], {}
    for place, check in enumerate(chosen):
        progress(place / len(chosen), check.name)
        began = time.monotonic()
        findings += _made(check.name, partial(check.run, subject))
        spent[check.name] = time.monotonic() - began
    if other is not None and train is not None:
        began = time.monotonic()
        progress(1 - 1 / (len(chosen) + 1), f"against {other[0]}")
        second = against.probe_of(other[1], subject, train)
        findings += _made("answers", partial(against.answers, subject, second))
        findings += _made("barrier", partial(against.layers_and_line, subject, second))
        spent |= dict.fromkeys(("answers", "similarity", "barrier"), (time.monotonic() - began) / 3)
    notes = probe.notes if probe is not None else ("Without data only the weights were looked at: give --data.",)
    return Audit(name, data, tuple(findings), tuple(notes), spent)


def _made(name: str, run: Callable[[], Finding | list[Finding] | None]) -> list[Finding]:
    """Return what a check found, or why it could not: the boundary where one check's failure must not lose the rest."""
    try:
        found = run()
    except NervureError as error:
        return [_untold(name, str(error).splitlines()[0])]
    except Exception as error:  # the user's own forward may fail in any way, and the report says how
        return [_untold(name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")]
    return found if isinstance(found, list) else [] if found is None else [found]


def _untold(name: str, why: str) -> Finding:
    return Finding(check=name, level="cannot tell", measured=why, meaning="", certainty="exact")
