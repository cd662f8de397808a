"""How the features hold the classes, and which of the inputs the answers hang on."""

from __future__ import annotations

import math
from typing import Any

from nervure.audit.finding import Finding, Remedy
from nervure.audit.subject import Subject
from nervure.core.forward import take
from nervure.inspect.cdnv_transfer import class_separability
from nervure.inspect.deep_linear_neural_collapse import neural_collapse
from nervure.inspect.simplicity_bias import reliance

# Forwards of a look at all default groups of an image: 16 regions and some channels, shuffled and kept.
LOOKS = 45


def collapse(subject: Subject) -> Finding:
    """Measure how far the last features of a class have gathered in one point, and whether classes have merged.

    Args:
        subject: The network and its data.

    Returns:
        The finding.
    """
    batch = subject.probe.batch(gradients=2 / 3, share=0.05, most=4000)
    found = subject.probe.run(neural_collapse, batch)
    last = list(found.layers.values())[-1]
    low, high = last.variability.interval
    measured = (
        f"on {len(batch[1])} training samples the scatter within classes is {last.variability.value:.3g} "
        f"[{low:.3g}, {high:.3g}] of that between them, averaged over the classes"
    )
    values = {"variability": last.variability.value, "low": low, "high": high, "lost": float(len(last.lost))}
    if not math.isfinite(last.variability.value):
        return Finding(check="collapse", level="cannot tell", measured="the class means are equal", meaning="")
    if last.lost:
        return Finding(
            check="collapse",
            level="problem",
            measured=f"{measured}; classes whose features are lost: {', '.join(map(str, last.lost))}",
            meaning="These classes have no direction of their own: the last layer cannot tell them from others.",
            certainty="medium",
            remedy=Remedy(
                "deep-linear-neural-collapse",
                "Small classes vanish under weight decay: weigh them more, or decay less.",
                "nervure show deep-linear-neural-collapse",
            ),
            values=values,
        )
    gathered = high < 0.1
    return Finding(
        check="collapse",
        level="note" if gathered else "ok",
        measured=measured,
        meaning="Each class has gathered in one point: fitted to the end, with little left that tells samples of a "
        "class apart, so take earlier layers for other tasks."
        if gathered
        else "Samples of a class still differ in their features.",
        certainty="medium",
        values=values,
    )


def separability(subject: Subject) -> Finding:
    """Measure on held-out samples how far the classes stand apart in the last features.

    Args:
        subject: The network and its data.

    Returns:
        The finding.
    """
    batch = _held_out(subject, 4000)
    found = subject.probe.run(class_separability, batch)
    last = list(found.layers.values())[-1]
    low, high = last.worst.interval
    one, other = last.nearest
    measured = (
        f"on {len(batch[1])} held-out samples the variance beside the distance of two classes is "
        f"{last.mean.value:.3g} on average; classes {one} and {other} are nearest with {last.worst.value:.3g} "
        f"[{low:.3g}, {high:.3g}]"
    )
    level: Any = {"ok": "ok", "warn": "note", "cannot tell": "cannot tell"}[found.verdict]
    return Finding(
        check="separability",
        level=level,
        measured=measured,
        meaning=f"Samples of {one} and {other} lie further from their means than these from each other."
        if level == "note"
        else "All classes stand apart."
        if level == "ok"
        else "Whether the nearest classes overlap cannot be told from so few samples.",
        certainty="medium",
        values={"mean": last.mean.value, "worst": last.worst.value},
    )


def feature_groups(subject: Subject) -> Finding:
    """Shuffle each group of input features across held-out samples, and everything but it.

    Args:
        subject: The network and its data.

    Returns:
        The finding.
    """
    batch = _held_out(subject, 300, forwards=LOOKS)
    found = subject.probe.run(reliance, batch)
    change = {name: part.without.change.value for name, part in found.groups.items()}
    most = max(change, key=change.__getitem__)
    part = found.groups[most]
    measured = (
        f"on {len(batch[1])} held-out samples the area under the curve is {found.intact.auc.value:.3f}; shuffling "
        f"{most} leaves {part.without.auc.value:.3f} [{part.without.auc.low:.3f}, {part.without.auc.high:.3f}], "
        f"keeping it alone {part.alone.auc.value:.3f} [{part.alone.auc.low:.3f}, {part.alone.auc.high:.3f}]"
    )
    if found.hangs_on:
        told = ", ".join(found.hangs_on)
        return Finding(
            check="feature groups",
            level="warning",
            measured=measured,
            meaning=f"The answers hang on {told} alone: if that is a shortcut, they will fail where it does not hold.",
            certainty="high",
            remedy=Remedy(
                "spectral-decoupling",
                "Train so that other features are learned too.",
                "nervure show spectral-decoupling",
            ),
            layers=change,
            unit="share of the scores' variance that goes with the group",
        )
    level: Any = "cannot tell" if found.verdict == "cannot tell" else "ok"
    return Finding(
        check="feature groups",
        level=level,
        measured=measured,
        meaning="No single group of features decides by itself." if level == "ok" else "The intervals do not say.",
        certainty="high",
        layers=change,
        unit="share of the scores' variance that goes with the group",
    )


def _held_out(subject: Subject, most: int, *, forwards: float = 1.0) -> tuple[Any, Any]:
    """Return as many held-out samples as five hundredths of the budget pay for."""
    assert subject.test is not None
    inputs, targets = subject.test
    paid = int(0.05 * subject.probe.seconds / (forwards * subject.probe.gradient_seconds / 3))
    part = slice(0, max(40, min(most, paid)))
    return take(inputs, part), targets[part]
