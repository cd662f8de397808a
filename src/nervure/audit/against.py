"""Two networks side by side: answers, layers, and the line between them before and after their units are matched."""

from __future__ import annotations

from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from nervure.audit.finding import Finding, Remedy, share
from nervure.audit.subject import Subject
from nervure.core.forward import outputs, take
from nervure.core.probe import Probe
from nervure.inspect.linear_mode_connectivity import LinearModeConnectivity, compare_networks

POINTS = 11


def answers(subject: Subject, other: Probe) -> Finding:
    """Compare the answers of both networks on the same held-out samples.

    Args:
        subject: The network and its data.
        other: The network it is compared with, on the same data.

    Returns:
        The finding.
    """
    assert subject.test is not None
    scores, targets = subject.scores
    count = _samples(subject)
    with torch.no_grad():
        parts = [
            outputs(other.model, take(subject.test[0], slice(at, min(at + 256, count)))) for at in range(0, count, 256)
        ]
    theirs, mine = torch.cat(parts).flatten(0, -2).argmax(1), scores.argmax(1)
    same, low, high = share(int((mine == theirs).sum()), len(targets))
    first, second = mine == targets, theirs == targets
    ahead, behind = int((first & ~second).sum()), int((second & ~first).sum())
    p = float(binomtest(ahead, ahead + behind).pvalue) if ahead + behind else 1.0
    told = "no difference in accuracy can be told" if p > 0.05 else "the first" if ahead > behind else "the other"
    return Finding(
        check="answers",
        level="note",
        measured=f"the same answer on {same:.1%} [{low:.1%}, {high:.1%}] of {len(targets)} held-out samples; only the "
        f"first is right on {ahead}, only the other on {behind} (exact McNemar test p = {p:.2g})",
        meaning=f"Of the two, {told}." if p > 0.05 else f"Of the two, {told} is more accurate.",
        values={"same": same, "only_first": float(ahead), "only_other": float(behind), "p": p},
    )


def _samples(subject: Subject) -> int:
    """Return how many held-out samples the scores are of: positions of a sequence are answers of their own."""
    assert subject.test is not None
    each = subject.test[1][:1].numel()
    return len(subject.scores[1]) // each


def layers_and_line(subject: Subject, other: Probe) -> list[Finding]:
    """Compare the layers, and the loss between the networks before and after their units are matched.

    Args:
        subject: The network and its data.
        other: The network it is compared with.

    Returns:
        The findings.
    """
    # Three lines of points, each a forward and the re-estimation of norms, a third of a gradient each.
    batch = subject.probe.batch(gradients=3 * POINTS * 2 / 3, share=0.4, most=512)
    found: LinearModeConnectivity = subject.probe.run(compare_networks, batch, other=other.model, points=POINTS)
    alike = found.same_layers
    count = len(batch[1])
    made = [
        Finding(
            check="similarity",
            level="note",
            measured=f"unbiased CKA of {len(alike)} layers of one name on {count} samples: "
            + (f"{min(alike.values()):.3f} to {max(alike.values()):.3f}" if alike else "none in common"),
            meaning="1 is the same up to rotation and scale, 0 nothing in common.",
            certainty="medium",
            layers=alike,
            unit="unbiased CKA",
        )
    ]
    if found.line is None or found.aligned is None or found.matching is None:
        made.append(
            Finding(check="barrier", level="cannot tell", measured="the networks have two shapes: no line joins them",
                    meaning="")
        )  # fmt: skip
        return made
    before, after = found.line.barrier, found.aligned.barrier
    told = {
        "ok": "They lie in one basin"
        + (", once their units are matched" if before > after + 1e-9 else "")
        + ": their average is a network as good as they are.",
        "warn": "A barrier of the loss parts them, also after matching: do not average their weights.",
        "cannot tell": "The control shows no barrier either, so this test has no power here.",
    }
    level: Any = {"ok": "ok", "warn": "note", "cannot tell": "cannot tell"}[found.verdict]
    control = f"{found.control:.4g}" if found.control is not None else "none"
    made.append(
        Finding(
            check="barrier",
            level=level,
            measured=f"the loss rises by {before:.4g} between them, by {after:.4g} after matching "
            f"({found.matching.certificate}) and by {control} for the control, {count} samples",
            meaning=told[found.verdict],
            certainty="high",
            remedy=Remedy(
                "linear-mode-connectivity", "Look at the line layer by layer.", "nervure show linear-mode-connectivity"
            ),
            values={
                "before": before,
                "after": after,
                "control": found.control if found.control is not None else float("nan"),
            },
        )
    )
    return made


def probe_of(model: nn.Module, subject: Subject, data: tuple[Any, Tensor]) -> Probe:
    """Bind the other network to the same data.

    Args:
        model: The other network.
        subject: The network under audit.
        data: Its training data.

    Returns:
        The probe.
    """
    return Probe(model, data, loss=subject.probe.loss, seconds=subject.probe.seconds, seed=subject.seed)
